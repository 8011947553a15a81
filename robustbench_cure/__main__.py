"""``python -m robustbench_cure`` is the command ``cure-bench``."""

from robustbench_cure.cli.main import main

if __name__ == "__main__":
    main()
