"""`python -m crocodil.harness run --model crocodil --model_args pretrained=DIR --tasks ...`.

lm_eval looks for models in its own list alone, not among entry points (0.4.13). So the model is registered here, and
the command line is then lm_eval's own.
"""

import sys

import crocodil.harness  # noqa: F401 - registers the model


def main() -> None:
    """Runs lm_eval's command line; errors a user can mend are one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"crocodil: {error}")


if __name__ == "__main__":
    main()
