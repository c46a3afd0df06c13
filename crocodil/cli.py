"""The command `crocodil`; heavy imports happen only in the command that needs them."""

import argparse
import sys
from collections.abc import Sequence

from crocodil import __version__

DEFAULT = "default: the pipeline's own, else"
TRAINER_COMMANDS = {
    "fit": "train a stage: --config lightning_configs/NAME.yaml [--model.init_args.x=...]",
    "validate": "held-out figures of a checkpoint on the validation split: --config ... --ckpt_path ...",
    "test": "the same on the test split, in more detail",
    "predict": "write texts as JSON lines: --config ... --ckpt_path ...",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything but the Trainer's own commands."""
    parser = argparse.ArgumentParser(
        prog="crocodil", description="A continuous sketch of the text guides a masked-diffusion language model."
    )
    parser.add_argument("--version", action="version", version=f"crocodil {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    _add_sample(commands.add_parser("sample", help="write texts with a pipeline: --pipeline DIR"))
    _add_export(commands.add_parser("export", help="turn checkpoints into a pipeline folder"))
    _add_plan(
        commands.add_parser("plan", help="memory and FLOPs of a training run, without its GPU", allow_abbrev=False)
    )
    _add_encode(
        commands.add_parser("encode", help="store the latents of a prior's corpus: --config ...", allow_abbrev=False)
    )
    _add_interpolate(commands.add_parser("interpolate", help="texts between two texts, by their registers"))
    _add_registers(commands.add_parser("registers", help="what each register of a text holds"))
    _add_neighbours(commands.add_parser("neighbours", help="texts of a corpus with the most similar registers"))
    _add_quickstart(commands.add_parser("quickstart", help="train a small system on this machine and compare"))
    return parser


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes texts, one JSON object a line: text, token_ids, cost."
    _add_pipeline(parser)
    parser.add_argument("--algorithm", default="conthendisc", help="masked, conthendisc or conwithindisc")
    parser.add_argument("--num_samples", type=int, default=4, help="texts, or texts for each prompt")
    parser.add_argument("--length", type=int, help="tokens to write; default: as many as the model reads")
    parser.add_argument("--num_steps", type=int, help=f"demasker calls a text; {DEFAULT} 8")
    parser.add_argument("--prompt", action="append", dest="prompts", metavar="TEXT", help="kept in front; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--remasking", metavar="RULE", help=f"docs/how-to-choose-a-sampler.md lists the rules; {DEFAULT} low_confidence"
    )
    parser.add_argument("--temperature", type=float, help=f"0 takes the most probable token; {DEFAULT} 0.7")
    parser.add_argument("--top_p", type=float, help="draw from the most probable tokens of this share")
    parser.add_argument("--top_k", type=int, help="draw from this many most probable tokens")
    parser.add_argument("--unmasking_schedule", help="tokens a step: linear (equal shares) or cosine (few at first)")
    parser.add_argument("--block_size", type=int, help="finish blocks of this many tokens from left to right")
    parser.add_argument("--eos", default="free", help="stop tokens: free, last (after all others) or never")
    parser.add_argument("--early_stop", action="store_true", help="end once every text has its stop token")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="cut texts before it; repeatable")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of the demasker; 1.0 is off")
    parser.add_argument("--guided_by", default="latents", help="what guidance compares without: latents or prompt")
    parser.add_argument("--cache", default="none", help="keys and values kept within a block: none, prefix or dual")
    parser.add_argument("--num_registers", type=int, help="read the first k registers only")
    parser.add_argument("--prior_network", help="what draws the sketch: prior or student; default: the prior, if any")
    parser.add_argument("--prior_steps", type=int, help="its steps; default: 32 of a prior, 4 of a student")
    parser.add_argument("--refresh_steps", type=int, nargs="+", help="steps before which conwithindisc draws again")
    parser.add_argument("--prior_guidance_scale", type=float, default=1.0, help="of conditional draws; 1.0 is off")
    parser.add_argument("--prior_temperature", type=float, help=f"below 1 sketches are more alike; {DEFAULT} 1.0")
    parser.add_argument("--compile", action="store_true", help="compile the networks: slow at first, then fast")
    parser.add_argument("--watch", action="store_true", help="show the first text while it is written")
    parser.add_argument("--film", metavar="FILE.html", help="write a page that shows how the first texts came to be")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    parser.add_argument("--output", metavar="FILE.jsonl", help="default: standard output")


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline", metavar="DIR", help="folder written by `crocodil export`; default: that of the project, if any"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Collects the stages' networks into one folder for `crocodil sample`."
    parser.add_argument("--autoencoder", metavar="CKPT", help="checkpoint of the autoencoder stage")
    parser.add_argument("--prior", metavar="CKPT", help="checkpoint of the prior stage")
    parser.add_argument("--student", metavar="CKPT", help="checkpoint of the student stage, a prior of few steps")
    parser.add_argument("--base", metavar="CKPT", help="checkpoint of the demasker stage, for the algorithm `masked`")
    parser.add_argument("--judge", metavar="CKPT", help="of the judge stage, alone: writes a folder for evaluations")
    parser.add_argument("--dtype", help="of the written weights: float32, bfloat16, float16; default: as trained")
    parser.add_argument("--output", required=True, metavar="DIR")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tells what the training run of a configuration needs: parameters, FLOPs, memory by part, and whether it fits "
        "on a GPU, which need not be there. Further options are those of `crocodil fit` (--model.x, --data.x, "
        "--trainer.x)."
    )
    parser.add_argument("--config", action="append", required=True, metavar="YAML", help="as for fit; repeatable")
    parser.add_argument("--gpu_memory", type=float, default=80.0, metavar="GIB", help="of one GPU; default: 80")
    parser.add_argument("--world_size", type=int, default=1, help="GPUs that share the weights (FSDP2); default: 1")
    parser.add_argument("--batch_size", type=int, help="texts on each GPU; default: as configured")
    parser.add_argument("--json", action="store_true", help="print one JSON object, memory in bytes")


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Encodes the corpus of a prior once; its training takes the folder by --data.init_args.latents=DIR. Killed and "
        "started again, it goes on. Further options are those of `crocodil fit` (--model.x, --data.x, --trainer.x)."
    )
    parser.add_argument("--config", action="append", required=True, metavar="YAML", help="as for fit; repeatable")
    parser.add_argument("--output", required=True, metavar="DIR", help="holds a folder for each split")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--shard_rows", type=int, help="texts in a file; default: as many as 256 MB hold")
    parser.add_argument("--dry_run", action="store_true", help="tell sizes and time, write nothing")


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains base, autoencoder, prior and judge on Python functions found on this machine, compares the samplers, "
        "and writes results.json, report.html and a pipeline. Interrupted and started again, it goes on."
    )
    parser.add_argument("--output_dir", default="quickstart", metavar="DIR", help="default: ./quickstart")
    parser.add_argument("--seed", type=int, default=0, help="of training and data order")
    parser.add_argument("--num_samples", type=int, help="texts for each row and seed of the comparison")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies all training steps; below 1 for a quick look"
    )


TEXT = "TEXT|@FILE"


def _add_interpolate(parser: argparse.ArgumentParser) -> None:
    """The options of `crocodil interpolate`."""
    parser.description = (
        "Goes from the registers of one text to those of another and writes what is on the way, one JSON object a line."
    )
    _add_common(parser)
    parser.add_argument("--first", required=True, metavar=TEXT, help="where the way begins")
    parser.add_argument("--second", required=True, metavar=TEXT, help="where it ends")
    parser.add_argument("--num_points", type=int, default=8, help="texts on the way, both ends among them")
    parser.add_argument("--kind", default="slerp", help="slerp keeps the scale of the registers, linear does not")
    _add_decoding(parser)


def _add_registers(parser: argparse.ArgumentParser) -> None:
    """The options of `crocodil registers`."""
    parser.description = (
        "Tells what each register of a text holds, one JSON object a register: the text written from the registers up "
        "to this one, the places where it became right, and how much the cross-entropy of each token rises, in nats, "
        "where this register alone is missing."
    )
    _add_common(parser)
    parser.add_argument("--text", required=True, metavar=TEXT, help="the text whose registers are tried")
    parser.add_argument("--other", metavar=TEXT, help="put the registers of this text in place; default: hide them")
    _add_decoding(parser)


def _add_neighbours(parser: argparse.ArgumentParser) -> None:
    """The options of `crocodil neighbours`."""
    parser.description = (
        "Finds the texts of a corpus whose registers have the largest cosine with those of a text, one JSON object a "
        "line. Of Python files, a pipeline of canonical functions reads each function that has a canonical form."
    )
    _add_common(parser)
    parser.add_argument("--text", required=True, metavar=TEXT, help="the text whose neighbours are wanted")
    parser.add_argument("--corpus", required=True, metavar="FILE.jsonl|DIR", help='lines {"text": ...}, or a folder')
    parser.add_argument("--pattern", default="**/*.py", help="which files of the folder; default: **/*.py")
    parser.add_argument("--num_neighbours", type=int, default=5)
    parser.add_argument("--num_registers", type=int, help="compare the first k registers only")
    parser.add_argument("--batch_size", type=int, default=64)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_steps", type=int, default=8, help="demasker calls a text")
    parser.add_argument("--remasking", default="low_confidence", metavar="RULE", help="as for sample")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, the most probable tokens")
    parser.add_argument("--seed", type=int, default=0)


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_pipeline(parser)
    parser.add_argument("--length", type=int, help="tokens of a text, as trained; default: all that the model reads")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    parser.add_argument(
        "--output", metavar="FILE", help="a page if it ends in .html, else JSON lines; default: standard output"
    )


def run(arguments: Sequence[str]) -> None:
    """Runs one command; errors a user can mend are ValueErrors of one sentence."""
    if arguments and arguments[0] in TRAINER_COMMANDS:
        from crocodil.trainer_cli import run_trainer

        run_trainer(list(arguments))
        return
    parser = build_parser()
    known, others = parser.parse_known_args(arguments)
    options = vars(known)
    command = options.pop("command")
    if others and command not in ("plan", "encode"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if command == "sample":
        from crocodil.commands import sample

        sample(**options)
    elif command == "export":
        from crocodil.commands import export

        export(**options)
    elif command == "plan":
        from crocodil.planner.command import plan

        plan(overrides=others, **options)
    elif command == "encode":
        from crocodil.encode import encode

        encode(overrides=others, **options)
    elif command in ("interpolate", "registers", "neighbours"):
        from crocodil.latents import commands

        getattr(commands, command)(**options)
    else:
        from crocodil.quickstart import quickstart

        quickstart(**options)


def main() -> None:
    """Entry point of the console script."""
    try:
        run(sys.argv[1:])
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"crocodil: {error}")
    except KeyboardInterrupt:
        print("\ncrocodil: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
