"""Cascades and audits: who is given what, what follows from a draw, and that runs can be cut and enlarged."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import partial

import made
import numpy as np
import pytest
import torch
from made import BATTERY_CARD, FGSM, NOISE
from scipy.stats import binom
from torch import nn

from robustbench_cure import load_battery
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import from_arrays
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.audit import DRAWS, AuditResult, drawn
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.evaluation.record import Record
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.evaluation.storage import merge
from robustbench_cure.gate.compare import compare
from robustbench_cure.gate.outcome import Rules
from robustbench_cure.protocol.cards import Battery, parse_card
from robustbench_cure.protocol.catalog import ranking_protocol
from robustbench_cure.report.charts import step_curves
from robustbench_cure.report.results import attack_table
from robustbench_cure.report.tables import deciding_attack
from robustbench_cure.report.terminal import terminal_table
from robustbench_cure.site.checklist import checklist
from robustbench_cure.stats import upper_bound

#: PGD on a linear network, and a control that breaks almost nothing: a search as weak as one can be.
PGD = made.PGD | {"id": "pgd", "steps": 10, "step_size": "1/25"}
WEAK = NOISE | {"draws": 1}
battery = partial(made.battery, eps="1/20")


def audited(*attacks, samples=0, name="PGD in full", **more) -> Battery:
    audit = {"name": name, "samples": samples, "attacks": [{**PGD, "id": "audit_pgd"}]}
    return battery(*(attacks or (WEAK,)), cascade=True, audit=audit, **more)


def network(seed=0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 16, generator=generator))
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    return net


def classifier(**options):
    return Classifier(network(), num_classes=2, input_shape=(1, 4, 4), **options)


def images(n=60):
    """Images in [0.3, 0.7], labelled by the network, one in six wrongly."""
    x = np.random.default_rng(1).uniform(0.3, 0.7, (n, 1, 4, 4)).astype(np.float32)
    y = network()(torch.from_numpy(x)).argmax(1).numpy()
    y[::6] = 1 - y[::6]
    return from_arrays("toy", "test", x, y, ids=[f"t/{i}" for i in range(n)], classes="ab")


def within(record, eps=1 / 20):
    """Samples classified correctly, and those of them with a boundary inside the ball: closed form."""
    data = images(record.n)
    order = [int(name[2:]) for name in record.samples["sample_id"]]
    x, y, net = data.images[order], data.labels[order], network()
    logits = net(x).detach()
    gap = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
    slope = (net[1].weight[0] - net[1].weight[1]).abs().sum()
    return (gap > 0).numpy(), ((gap > 0) & (gap / slope <= eps)).detach().numpy()


# --- cascades --------------------------------------------------------------------------------------------


def test_in_a_cascade_an_attack_gets_what_the_ones_before_left_robust():
    attacks = (WEAK | {"draws": 3}, FGSM, PGD)
    single, cascade = (
        evaluate(classifier(), battery(*attacks, cascade=cascade), images()) for cascade in (False, True)
    )
    robust = cascade.clean_correct
    for spec in cascade.attacks:
        assert (cascade.samples[f"{spec.id}.attacked"] == robust).all()
        robust &= ~cascade.samples[f"{spec.id}.broken"]
        assert cascade.robust_accuracy(spec.id).count == int(robust.sum())
        assert cascade.robust_accuracy(spec.id).total == 60
    breakers = sum(cascade.samples[f"{spec.id}.broken"].astype(int) for spec in cascade.attacks)
    assert breakers.max() == 1
    assert cascade.samples["fgsm.broken"].any()
    assert (cascade.worst_case == single.worst_case).all()
    correct, reached = within(cascade)
    assert (cascade.worst_case.to_numpy(bool) == (correct & ~reached)).all()
    assert cascade.manifest.cost["pgd"].backwards < single.manifest.cost["pgd"].backwards


def test_no_two_attacks_of_a_cascade_share_a_trajectory():
    """Each has rows of its own: PGD(10) after PGD(5) is given what PGD(5) left."""
    steps = [PGD | {"id": f"pgd{k}", "steps": k, "step_size": "1/50"} for k in (5, 10)]
    record = evaluate(classifier(), battery(*steps, cascade=True, eps="1/10"), images())
    assert record.samples["pgd10.attacked"].sum() == record.robust_accuracy("pgd5").count


def test_reports_of_a_cascade_print_the_falling_accuracy_and_no_comparison_between_attacks():
    record = evaluate(classifier(), battery(WEAK, FGSM, PGD, cascade=True), images())
    rows = {row["attack"]: row for row in attack_table([record]).data}
    assert rows["pgd"]["count"] == rows["worst"]["count"] <= rows["fgsm"]["count"]
    assert rows["fgsm"]["only_this_attack"] is None


# --- the draw --------------------------------------------------------------------------------------------


def test_all_survivors_are_drawn_once_where_as_many_are_asked_for():
    margins = np.arange(7.0)
    for asked in (0, 7, 8, 1000):
        assert (drawn(margins, asked, 0) == 1).all()
    assert not len(drawn(margins[:0], 5, 0))


@pytest.mark.parametrize(("n", "m"), [(40, 10), (97, 20), (23, 22), (5, 3)])
def test_one_sample_is_drawn_from_each_stratum_of_the_margins(n, m):
    margins = np.random.default_rng(0).permutation(n).astype(float)
    times = np.zeros(n)
    for seed in range(600):
        draws = drawn(margins, m, seed)
        assert draws.sum() == m
        place = np.repeat(np.argsort(margins), draws[np.argsort(margins)]).argsort()
        ranks = np.sort(margins[np.repeat(np.arange(n), draws)])  # the k-th lies in the k-th stratum
        assert (ranks >= np.floor(np.arange(m) * n / m) - 1e-9).all()
        assert (ranks <= np.ceil((np.arange(m) + 1) * n / m) - 1 + 1e-9).all(), place
        times += draws
    # Every sample has the same chance, whatever its margin: m / n.
    spread = np.sqrt(600 * m / n)
    assert (np.abs(times - 600 * m / n) < 5 * spread).all()


def test_the_draw_follows_the_seed_and_the_margins_alone():
    margins = np.random.default_rng(0).normal(size=50)
    first = drawn(margins, 9, 0)
    assert (drawn(margins, 9, 0) == first).all()
    assert (drawn(margins, 9, 1) != first).any()
    order = np.random.default_rng(1).permutation(50)
    assert (drawn(margins[order], 9, 0) == first[order]).all()


# --- the bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 20, 200])
def test_the_upper_bound_is_that_of_clopper_and_pearson(m):
    assert upper_bound(0, m) == pytest.approx(1 - 0.05 ** (1 / m))
    assert upper_bound(m, m) == 1.0
    for k in range(0, m, max(1, m // 7)):
        assert binom.cdf(k, m, upper_bound(k, m)) == pytest.approx(0.05)


BROKEN = {
    "the lowest margins": lambda n, k: np.arange(n) < k,
    "the highest margins": lambda n, k: np.arange(n) >= n - k,
    "anywhere": lambda n, k: np.random.default_rng(0).permutation(n) < k,
    "every other one": lambda n, k: (np.arange(n) % 2 == 0) & (np.arange(n) < 2 * k),
}


@pytest.mark.parametrize(("n", "m"), [(200, 40), (97, 20), (45, 30)])
def test_the_bound_covers_the_truth_in_95_of_100_draws(n, m):
    """Whatever part of the survivors the stronger protocol breaks: 1,000 audits of each."""
    draws = np.stack([drawn(np.arange(n, dtype=float), m, seed) for seed in range(1000)])
    bounds = np.array([upper_bound(k, m) for k in range(m + 1)])
    for where in BROKEN.values():
        for k in (0, 1, 2, n // 20, n // 8, n // 3):
            broken = where(n, k)
            found = draws[:, broken].sum(1)
            covered = int((bounds[found] >= broken.mean() - 1e-12).sum())
            assert covered >= 950 - 2 * np.sqrt(1000 * 0.05 * 0.95)
            # The estimate is unbiased.
            assert abs(found.mean() / m - broken.mean()) < 5 * np.sqrt(0.25 / m / 1000)


# --- what a record says ----------------------------------------------------------------------------------


def test_an_audit_of_all_survivors_leaves_the_number_of_the_stronger_protocol():
    record = evaluate(classifier(), audited(), images())
    correct, reached = within(record)
    audit, survivors = record.audit, record.robust(record.attacks)
    assert (record.samples[DRAWS] == survivors.astype(int)).all()
    assert (record.samples["audit_pgd.attacked"] == survivors).all()
    assert (record.worst_case.to_numpy(bool) == (correct & ~reached)).all()
    assert (audit.whole, audit.survivors, audit.draws) == (True, int(survivors.sum()), int(survivors.sum()))
    lost = int((survivors.to_numpy(bool) & reached).sum())
    assert audit.lost == audit.broken == lost > 0
    assert audit.bound == pytest.approx(lost / 60)
    assert f"all {audit.survivors} survivors" in audit.words
    (flag,) = [flag for flag in record.flags if flag.kind == "search_weaker_than_reference"]
    assert flag.value == lost


def test_a_search_as_strong_as_its_audit_is_bounded_and_not_flagged():
    record = evaluate(classifier(), audited(PGD, samples=10), images())
    audit = record.audit
    assert (audit.draws, audit.broken, audit.whole) == (10, 0, False)
    assert audit.bound == pytest.approx((1 - 0.05**0.1) * audit.survivors / 60)
    assert not [flag for flag in record.flags if flag.kind == "search_weaker_than_reference"]
    points = np.ceil(1000 * audit.bound) / 10  # never printed smaller than it is
    assert f"lower it by at most {points:.1f} points (95 %, m = 10, k = 0)" in audit.words
    assert audit.words.split(";")[0][:30] in " ".join(terminal_table([record]).split())


def test_a_weak_search_is_corrected_and_flagged():
    record = evaluate(classifier(), audited(samples=12), images())
    audit = record.audit
    assert 0 < audit.broken < 12
    assert not audit.whole
    assert audit.estimate == pytest.approx(audit.survivors / 60 * (1 - audit.broken / 12))
    assert audit.bound == pytest.approx(upper_bound(audit.broken, 12) * audit.survivors / 60)
    assert record.worst_case_accuracy.count == audit.survivors - audit.lost
    (flag,) = [flag for flag in record.flags if flag.kind == "search_weaker_than_reference"]
    assert f"k = {audit.broken}" in flag.evidence
    row = attack_table([record]).data[-2]
    assert (row["attack"], row["kind"]) == ("audit", "audit")
    assert (row["audit_draws"], row["audit_broken"]) == (12, audit.broken)
    assert row["audit_bound"] == audit.bound


def found(survivors, draws, broken, *, total=1000, whole=False):
    return AuditResult("AutoAttack", total, survivors, draws, broken, broken, whole)


def test_bounds_are_printed_on_the_safe_side():
    """Upper ones are rounded up, lower ones down, to a tenth of a point."""
    for survivors in range(100, 400):
        upper = found(survivors, 200, 0)
        printed = float(upper.words.split("at most ")[1].split()[0])
        assert printed >= 100 * upper.bound > printed - 0.1 - 1e-9
        lower = found(survivors, 200, 1)
        printed, least = float(lower.words.split("at least ")[1].split()[0]), survivors / 1000 - lower.bound
        assert printed <= 100 * max(least, 0) + 1e-9 < printed + 0.1 + 1e-9


def test_nothing_is_claimed_where_all_draws_but_one_are_broken():
    assert found(300, 200, 199).bound == pytest.approx(0.3)
    assert found(300, 200, 198).bound < 0.3
    assert found(300, 1, 0).bound == pytest.approx(0.95 * 0.3)  # one draw: the exact bound


def test_nothing_is_audited_where_nothing_is_left():
    record = evaluate(classifier(), audited(PGD, eps="2/5", samples=5), images())
    assert record.worst_case_accuracy.count == 0
    assert (record.audit.survivors, record.audit.draws, record.audit.whole) == (0, 0, True)
    assert record.audit.bound == 0.0
    assert "nothing was left" in terminal_table([record])


def test_records_without_an_audit_have_none():
    record = evaluate(classifier(), battery(FGSM), images())
    assert record.audit is None
    assert DRAWS not in record.samples
    assert record.manifest.config.audit is None


# --- runs that are cut, joined and enlarged ----------------------------------------------------------------


def counted():
    """Implementations that count what they are given, and what was counted, by kind."""
    given: dict[str, int] = {}

    def counting(kind):
        def attack(model, x, y, **hyper):
            given[kind] = given.get(kind, 0) + len(x)
            return ATTACKS[kind](model, x, y, **hyper)

        return attack

    return given, {kind: counting(kind) for kind in ("uniform_noise", "pgd", "fgsm")}


def table(path):
    return (path / "samples.parquet").read_bytes()


def test_an_audit_is_the_same_whatever_the_shards_and_batches(tmp_path):
    for size in (7, 60):
        evaluate(
            classifier(batch_size=size),
            audited(samples=9),
            images(),
            out=tmp_path / str(size),
            shard_size=size,
        )
    one, other = (Record.load(tmp_path / str(size)).samples for size in (7, 60))
    assert one.drop(columns="rank").equals(other.drop(columns="rank"))


def test_an_interrupted_audit_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("robustbench_cure.evaluation.shard.CHECKPOINT_INTERVAL", 0.0)
    fast = {"name": "two", "samples": 20, "attacks": [{**FGSM, "id": "a"}, {**PGD, "id": "b"}]}
    protocol = battery(WEAK, cascade=True, audit=fast)
    evaluate(classifier(), protocol, images(), out=tmp_path / "whole", shard_size=25)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            classifier(),
            protocol,
            images(),
            out=tmp_path / "cut",
            shard_size=25,
            attacks={**ATTACKS, "pgd": stop},
        )
    assert not (tmp_path / "cut" / "samples.parquet").exists()
    given, attacks = counted()
    evaluate(
        classifier(), protocol, images(), out=tmp_path / "cut", shard_size=25, resume=True, attacks=attacks
    )
    assert "uniform_noise" not in given
    assert "fgsm" not in given
    assert given["pgd"] > 0
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


def outcome(path):
    table = Record.load(path).samples
    return table[[name for name in table if name.endswith((".attacked", ".broken", ".forwards", ".pred"))]]


def test_a_finished_run_is_audited_further_without_searching_again(tmp_path):
    protocol = audited(samples=9)
    small = evaluate(classifier(), protocol, images(), out=tmp_path / "small")
    evaluate(classifier(), protocol, images(), out=tmp_path / "large", audit=0)
    given, attacks = counted()
    record = evaluate(
        classifier(), protocol, images(), out=tmp_path / "small", resume=True, audit=0, attacks=attacks
    )
    assert set(given) == {"pgd"}
    assert given["pgd"] == small.audit.survivors - int((small.samples[DRAWS] > 0).sum())  # the others alone
    assert record.audit.whole
    assert (record.audit.draws, record.audit.broken) == (record.audit.survivors, record.audit.lost)
    assert outcome(tmp_path / "small").equals(outcome(tmp_path / "large"))
    given.clear()
    for again in (None, 0, 9):  # what is found stays found
        record = evaluate(
            classifier(),
            protocol,
            images(),
            out=tmp_path / "small",
            resume=True,
            audit=again,
            attacks=attacks,
        )
        assert record.audit.whole
    assert not given


@pytest.mark.parametrize("first", [9, 0])
@pytest.mark.parametrize("other", [1, 8, 10, 59])
def test_an_audit_of_another_size_is_another_draw_and_refused(tmp_path, first, other):
    """Else one could try sizes until none of the draws breaks."""
    evaluate(classifier(), audited(), images(), out=tmp_path, audit=first)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match=f"its audit draws {first or 'all'} survivors, not {other}"):
        evaluate(classifier(), audited(), images(), out=tmp_path, resume=True, audit=other)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_an_interrupted_enlargement_leaves_the_finished_record_readable(tmp_path):
    evaluate(classifier(), audited(samples=9), images(), out=tmp_path, save_adversarials=True)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            classifier(),
            audited(samples=9),
            images(),
            out=tmp_path,
            resume=True,
            audit=0,
            attacks={**ATTACKS, "pgd": stop},
            save_adversarials=True,
        )
    assert Record.load(tmp_path).audit.draws == 9
    kept = (tmp_path / "adversarials" / "audit-audit_pgd.safetensors").read_bytes()
    evaluate(
        classifier(), audited(samples=9), images(), out=tmp_path, resume=True, audit=0, save_adversarials=True
    )
    assert Record.load(tmp_path).audit.whole
    assert (tmp_path / "adversarials" / "audit-audit_pgd.safetensors").read_bytes() == kept
    assert (tmp_path / "adversarials" / "audit-rest-audit_pgd.safetensors").exists()


def test_whole_runs_and_parts_of_other_audits_are_not_joined(tmp_path):
    options = {"shard_size": 20}
    evaluate(classifier(), audited(samples=9), images(), out=tmp_path / "whole", **options)
    with pytest.raises(UsageError, match="is a whole run, which has its own audit"):
        merge([tmp_path / "whole"], tmp_path / "joined")
    for i, audit in ((1, 9), (2, 5)):
        evaluate(
            classifier(), audited(), images(), out=tmp_path / f"{i}", shard=(i, 2), audit=audit, **options
        )
    with pytest.raises(UsageError, match="audit was 9, now 5"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_parts_are_audited_when_they_are_joined_and_resumed(tmp_path):
    protocol, options = audited(samples=9), {"shard_size": 20}
    evaluate(classifier(), protocol, images(), out=tmp_path / "whole", **options)
    for i in (1, 2):
        part = evaluate(classifier(), protocol, images(), out=tmp_path / f"{i}", shard=(i, 2), **options)
        assert part.audit.draws == 0
    joined = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "joined")
    assert "not audited" in joined.audit.words
    assert joined.audit.bound == pytest.approx(joined.audit.survivors / 60)
    given, attacks = counted()
    evaluate(
        classifier(), protocol, images(), out=tmp_path / "joined", resume=True, attacks=attacks, **options
    )
    assert set(given) == {"pgd"}
    assert table(tmp_path / "joined") == table(tmp_path / "whole")


# --- what is refused -------------------------------------------------------------------------------------


CARD = BATTERY_CARD + '[audit]\nname = "x"\nsamples = 1\n'
IN_AUDIT = '[[audit.attacks]]\nid = "{}"\nkind = "fgsm"\nname = "FGSM"\nlimit = {}\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (CARD, "audit.attacks"),
        (CARD + IN_AUDIT.format("fgsm", 0), "'fgsm' appears twice"),
        (CARD + IN_AUDIT.format("audit", 0), "'audit'"),
        (CARD + IN_AUDIT.format("other", 5), "limit"),
        (BATTERY_CARD.replace('id = "fgsm"', 'id = "clean"'), "'clean'"),
        (BATTERY_CARD.replace('id = "fgsm"', 'id = "worst"'), "'worst'"),
        (CARD.replace('name = "x"', 'name = ""') + IN_AUDIT.format("other", 0), "audit.name"),
        (
            BATTERY_CARD.replace("[threat]", "cascade = true\n[threat]").replace("limit = 0", "limit = 3"),
            "limit",
        ),
        (CARD.replace("samples = 1", "samples = -1") + IN_AUDIT.format("other", 0), "samples"),
    ],
)
def test_a_card_whose_audit_cannot_be_right_is_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint) as refused:
        parse_card(Battery, text, "tiny.toml", "tiny")
    assert "\n" not in str(refused.value)


def test_an_audit_is_asked_for_only_where_there_is_one():
    with pytest.raises(UsageError, match="has no audit"):
        evaluate(classifier(), battery(FGSM), images(), audit=3)
    with pytest.raises(UsageError, match="has no audit"):
        made.invoke("evaluate", "--n", "5", "--audit", "3")
    for wrong in ("0", "-1", "some"):
        answer = made.invoke("evaluate", "--n", "5", "--battery", "reference", "--audit", wrong)
        assert answer.exit_code == 2
        assert "all or a positive number" in answer.output


def test_too_few_classes_for_a_loss_are_refused_before_anything_runs():
    with pytest.raises(UsageError, match=r"audit_apgd_t.*at least 4 classes, the model has 2"):
        evaluate(classifier(), load_battery("reference"), images())


# --- which protocols rank ----------------------------------------------------------------------------------


def test_a_protocol_ranks_by_its_content_at_any_radius():
    for name, kind in (
        ("reference", "reference"),
        ("reference_l2", "reference"),
        ("autoattack", "autoattack"),
        ("autoattack_l2", "autoattack"),
        ("strong", ""),
    ):
        shipped = load_battery(name)
        assert ranking_protocol(shipped) == kind
        assert ranking_protocol(shipped.at("3/255")) == kind
        again = Battery.model_validate_json(shipped.at("3/255").model_dump_json())  # as a manifest holds it
        assert ranking_protocol(again) == kind
    reference = load_battery("reference")
    weaker = reference.attacks[1].model_copy(update={"steps": 50})
    for change in (
        {"attacks": (reference.attacks[0], weaker, *reference.attacks[2:])},
        {"audit": None},
        {"cascade": False},
        {"audit": reference.audit.model_copy(update={"attacks": reference.audit.attacks[:1]})},
    ):
        assert ranking_protocol(reference.model_copy(update=change)) == ""
    assert ranking_protocol(battery(FGSM, id="reference", name=reference.name)) == ""


def test_the_audit_of_the_reference_is_autoattack_in_full():
    for suffix in ("", "_l2"):
        reference, full = load_battery(f"reference{suffix}"), load_battery(f"autoattack{suffix}")
        assert reference.threat == full.threat
        plain = [
            spec.model_copy(update={"id": spec.id.removeprefix("audit_")}) for spec in reference.audit.attacks
        ]
        assert tuple(plain) == full.attacks
        assert full.cascade
        half = reference.at("1/4" if suffix else "4/255")
        assert half.audit.attacks == reference.audit.attacks  # their steps follow from the radius
        assert half.audit.samples == reference.audit.samples


def test_the_audit_draws_what_autoattack_would_draw(monkeypatch):
    """Its attacks have the random numbers of the battery `autoattack`: the same samples are broken."""
    full, reference = load_battery("autoattack"), load_battery("reference")
    for ours, theirs in zip(reference.audit.attacks, full.attacks, strict=True):
        assert ours.stream == theirs.stream


def test_the_raw_rate_of_gradients_is_recorded_and_not_counted():
    model = classifier()
    record = evaluate(model, battery(FGSM), images())
    m = record.manifest
    assert m.environment.gradient_rate > 0
    assert m.passes == sum(cost.forwards + cost.backwards for cost in m.cost.values())
    assert m.gradient_share == pytest.approx(m.passes / 2 / m.environment.gradient_rate / m.seconds)
    assert json.loads(m.model_dump_json())["environment"]["gradient_rate"] > 0
    old = m.model_copy(update={"environment": m.environment.model_copy(update={"gradient_rate": 0.0})})
    assert old.gradient_share is None


# --- what the gate says ------------------------------------------------------------------------------------


def test_the_gate_leaves_audits_out_unless_both_are_of_all_survivors():
    part, more, whole = (evaluate(classifier(), audited(), images(), audit=k) for k in (5, 20, 0))
    assert whole.worst_case_accuracy.count < part.worst_case_accuracy.count
    for new, baseline in ((whole, part), (part, whole), (more, part)):
        comparison = compare(new, baseline, Rules())
        assert comparison.outcome.exit_code == 0
        assert any(note.what == "audit" for note in comparison.notes)
    # What the audit broke is broken: the minimum is held against it, whatever is compared.
    least = Fraction(part.robust(part.attacks).sum() - 1, part.n)
    assert part.worst_case_accuracy.value < least
    assert compare(part, whole, Rules(min_robust=least)).outcome.exit_code == 1
    worst = compare(whole, whole, Rules()).rows[-1].accuracy
    assert (worst.id, worst.pairs.after) == ("worst_case", whole.worst_case_accuracy.count)


# --- attacks in a cascade are judged by what they were given -----------------------------------------------


def test_a_control_that_comes_first_is_not_called_stronger_than_gradients():
    """What it breaks is not given to the others, which would have broken it, too."""
    noise = WEAK | {"draws": 300}
    record = evaluate(classifier(), battery(noise, FGSM, PGD, cascade=True, eps="1/5"), images())
    assert record.samples["noise.broken"].any()
    assert not [flag for flag in record.flags if flag.kind == "black_box_stronger"]
    (item,) = [item for item in checklist(record, None) if item.name.startswith("Random noise")]
    assert item.status == "met"
    most = max(record.attacks, key=lambda spec: record.samples[f"{spec.id}.broken"].sum())
    assert deciding_attack(record) == f"most by {most.name}"
    assert not step_curves(record)
    one, other = (
        evaluate(classifier(), battery(PGD, FGSM, cascade=cascade), images()) for cascade in (True, False)
    )
    assert step_curves(one) == step_curves(other) != []


def test_attacks_of_the_caller_are_flagged():
    plain = evaluate(classifier(), audited(), images(), attacks=dict(ATTACKS))
    assert "replaced_attacks" not in {flag.kind for flag in plain.flags}
    _, attacks = counted()
    record = evaluate(classifier(), audited(), images(), attacks={**ATTACKS, "pgd": attacks["pgd"]})
    (flag,) = [flag for flag in record.flags if flag.kind == "replaced_attacks"]
    assert flag.evidence == "pgd"


def test_the_raw_rate_is_measured_once_for_a_run(tmp_path, monkeypatch):
    first = evaluate(classifier(), battery(FGSM), images(), out=tmp_path)
    monkeypatch.setattr(
        "robustbench_cure.evaluation.evaluate.gradient_rate", lambda *_: pytest.fail("measured again")
    )
    again = evaluate(classifier(), battery(FGSM), images(), out=tmp_path, resume=True)
    assert again.manifest.environment.gradient_rate == first.manifest.environment.gradient_rate > 0
