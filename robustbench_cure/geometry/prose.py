"""What the geometry pages say about their figures."""

from __future__ import annotations


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.strip().split("\n\n"))


CURVATURE = _paragraphs("""
How the loss bends around an image: a strongly curved loss lets a short step change it much. The CURE
paper finds that adversarial training flattens these profiles, and that penalising curvature makes
networks robust.

Finite differences of the gradient with the step named below, in normalised inputs: the profile depends
on the step. ||Hz|| is taken along the sign of the gradient; the alignment is the cosine between the
gradient and the top eigenvector, over the images that have a gradient.
""")

DISTANCE = _paragraphs("""
How far is each image from a change of its predicted label? rho is the average robustness of the thesis: the
mean length of the smallest perturbation, divided by the image's own. It is found by DeepFool, which may miss
a shorter one: the number is an upper bound. "Steps" are its iterations; the thesis needs fewer than 3.

FGSM is rho by a single step of the gradient's sign, one length (eps, in grey levels) for all images, long
enough to change 90 % of them; where no length is, the largest share that any changes stands in its place.
The thesis finds it four to five times as long on CIFAR-10: one step says little about distances.

Predictions, right or wrong, and no box: robust accuracy is another number.
""")

CURVE = _paragraphs("""
PGD at every radius, on what the smaller radii left: the curve cannot rise, and begins at the clean
accuracy. A curve that does not come down for large radii is a sign of masked gradients.
""")

BOUNDS = _paragraphs("""
If the loss were quadratic around an image, its distance to the threshold would lie between two bounds
that fall as the curvature nu grows. Here they are computed for the log-loss of the label against the
best other class, whose threshold log 2 is exactly the change of label, and set beside the distance
DeepFool finds in the same normalised inputs, without its 2 % overshoot. "Quadratic" is the exact distance of
the quadratic model.

Networks are not quadratic: the last column says how often the found distance lies inside. The model
depends on the step: where it is longer than the distance it sees past the boundary. Images that
are misclassified, or along which the loss does not curve upwards, are left out.
""")

SECTION = _paragraphs("""
Green is the region of the image's own label, other colours are other labels; the dot is the image. The
vertical axis is the normal of the nearest boundary, the horizontal one a random direction. The CURE
paper finds that regions widen and boundaries flatten in adversarially trained networks.
""")

GALLERY = _paragraphs("""
The smallest perturbation DeepFool finds for each image and network (l2, in pixels), and the image with
it added. Perturbations are stretched to the full range of grey levels, so that their size shows in the
numbers alone. The CURE paper finds them to look like objects, not noise, for robust networks.
""")

EVOLUTION = _paragraphs("""
Curvature and robustness after every epoch, as training logged them: the Frobenius norm of the Hessian of
the loss, its product with the sign of the gradient, and the accuracy under PGD. The CURE paper shows both
curvatures falling while robustness rises.
""")

SURFACE = _paragraphs("""
Height is the negative cross-entropy of the true label over the plane of the nearest boundary's normal r
and a random direction v; the dot is the image. A cliff close to the dot is what an attack walks over;
the CURE paper finds it gone, and the surface nearly linear, after its training.
""")

SUBSPACE = _paragraphs("""
How much longer a perturbation must be when it may use a random subspace of m of the d inputs only: on the
way from noise (m = 1) to the worst case (m = d). A subspace is drawn for every image anew. Lengths end where
the label first changes on DeepFool's way, not where DeepFool ends; on a line (m = 1) both ways are looked
along.

beta = sqrt(m/d) x (shortest in the subspace) / (shortest of all), averaged over the images. Flat boundaries
keep it in the interval named below, near 1 for all but few m, and the thesis finds real networks there, down
to m = d/100. Where m is a few, some subspaces run along the nearest boundary and make the mean large, others
meet the boundary of another class first: the median is then the better number, and neither tells curvature.

In the median and the interval, images for which nothing was found in the subspace count as infinitely far; a
star marks means without them.
""")

FREQUENCY = _paragraphs("""
The shortest perturbation made of one band of frequencies alone (blocks along the diagonal of the discrete
cosine transform), beside the shortest of all. Lengths end where the label first changes on DeepFool's way; in
a band of one frequency both ways are looked along.

beta = sqrt(m/d) x rho in the band / rho, where rho is the mean over the images of the perturbation's length
divided by the image's own (thesis, Eq. 3.20): 1 is what a random subspace of the same dimension gives. Below
1 the network reacts to this band more than to noise. Median and std are those of the ratios of single images.

In the median, images for which nothing was found in the band count as infinitely far. A star marks numbers
without them: of the images easiest to move, and so too small.
""")

UNIVERSAL = _paragraphs("""
One perturbation added to every image, sought on half of the images (by DeepFool on one after the other, or by
the gradient of batches; kept short) and judged on the other half, on both with the sum cut to [0, 1]: what
counts is an image. "Sought" and "fooled" are the shares of images, in per cent, whose predicted label changes
on the one and on the other; "random" is that of noise of the largest length allowed, on average over several
vectors.

The thesis finds such perturbations for all networks it looks at; they carry over to other networks, and most
images end at the same few labels. Below the pictures: for how many labels some images change, which labels
most of the images of each become, and how many parts the graph of these changes has. What is counted is the
change of the prediction, right or wrong: robust accuracy is another number.
""")

DETECTION = _paragraphs("""
Can perturbed images be told from natural ones by how the boundaries around them bend? The score of an image
is the mean curvature of the level sets through it, over random directions and all other classes. The thesis
finds it negative for natural images and positive for images carried just past a boundary, which then bends
towards them.

AUC is the probability that a perturbed image scores higher than a natural one: 0.5 is guessing, less says
that the sign is the other one. "a r" is DeepFool's smallest perturbation times a; "noise" has its length
and no direction, and should not be told; "chosen r" is an attacker who knows the detector and takes for
each image the scale of lowest score. "Flagged" is the share with a score of 0 or more: of natural images,
false alarms. "Accuracy" counts natural and perturbed images at the best threshold, which is chosen on one
half of the images and judged on the other, both ways. "Restored" is the share of flagged images, among those
whose label was changed, that are given it back.

With "--at boundary" the curvature is that of the nearest boundary, and the label beyond it the one that is
given back.

A detector is a defence only against attackers who do not know it: this page says what curvature tells, not
that a model is robust.
""")

BOUNDARY = _paragraphs("""
How the nearest boundary of each image bends: principal curvatures, from the most positive, where the
boundary bends towards the image, to the most negative, where it bends away. The thesis finds most of them
near zero, and more bending away than towards.

Finite differences whose step is the distance of the boundary, unless the settings say otherwise: the
boundary of a piecewise linear network is curved at that scale only. "Curvature" is the mean over all
directions, "largest" and "smallest" are the ends of the principal curvatures, all of them averaged over the
images. "Away" counts the images whose boundary bends away from them on average; "towards" the minimally
perturbed images whose nearest boundary bends towards them: mostly the same boundary seen from its other side.
Both are out of the boundaries with a known curvature.

Each is the boundary near the point where DeepFool ends, which need not be the nearest one of all: "cosine" in
the files is that between its way and the normal of the boundary, 1 at the nearest point.
""")

SHARED = _paragraphs("""
Do boundaries near different images have something in common? From the boundaries near some of the images
come three subspaces: S_f of their normals, S_c of the directions along which they bend towards the images
on average, and the u_i, the directions along which they bend most, either way. All are judged on the
others.

"Attack", "difference" and "shift" are the shares of their length that adversarial perturbations, differences
of two images and the shift of an image by a pixel have among the first m directions u_i; a random vector has
sqrt(m/d). The thesis finds 0.6 for adversarial ones and less than chance for differences. "rho 1" is how much
more boundaries bend along u_1 than along a random direction. S_c, S_f and "any" are the shares of the n
unseen images whose label a vector of the length named below changes, drawn from the subspace or from all
inputs. S_f has no more dimensions than there are normals.

The thesis finds that universal perturbations live in S_c, as boundaries bend towards the images along it,
while they bend away along most directions: random vectors of it fool most images, and noise
in the shared directions changes labels where the same noise outside of them does not.
""")

CONNECTIVITY = _paragraphs("""
Is a classification region connected? Two points with the same predicted label are joined by a polyline that
does not leave their region: two images; an image and one of another region, carried into the first one's by
the smallest perturbation; an image and a random point of an image's norm, carried likewise. Pairs whose
second point cannot be carried there, or lies on a tie of two labels, are left out.

"Straight" are the pairs that a segment joins. "Anchors" is the mean number of points between the ends, D the
length of the path over the distance of its ends: first over all paths found, segments among them, as in the
thesis, then over those where a segment is not enough. "Outside" is the share of anchors with a pixel outside
[0, 1]; a dash: there is no such path. The thesis finds a path for all pairs, with about 10 anchors and
D = 1 + 1e-4: regions are connected though not convex. A path is known at its samples only, and where none is
found there may still be one.

A region is convex if every convex combination of its images stays in it; for two images the thesis finds
that with probability about 0.8, and less for more.
""")
