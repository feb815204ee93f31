"""From a command line to a flat `argparse.Namespace` in Megatron's names, without importing torch.

One idea: values come from three places, later ones winning: the option table (Megatron's defaults), the
preset, and what the command line really says. argparse is therefore run without defaults, so that
`--num-layers 32` counts as given even where it repeats the preset. The rest of the trainer reads plain
attributes (`args.micro_batch_size`) that hold plain Python values only, because they are saved in every
checkpoint.

Traps: every failure is a `ConfigError`, argparse's own included; only `--help` leaves by itself.
Abbreviations are not accepted. Warnings go to standard error on rank 0, so that `--print-config` leaves clean
JSON on standard output.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, NoReturn

from metis.errors import ArgumentParser, ConfigError, nearest_name
from metis.training.foreign_options import IGNORED, REFUSED_VALUES, refusal
from metis.training.options import GROUPS, OPTIONS, Option
from metis.training.presets import preset_values
from metis.training.validation import validate_args
from metis.training.validation_checks import warn

__all__ = ["parse_args", "print_args", "validate_args"]

_DEFAULT_MASTER_PORT = 29500
_RULER = "-" * 24


def parse_args(argv: list[str] | None = None, *, single_process: bool = False) -> argparse.Namespace:
    """Parse `argv` (None: `sys.argv[1:]`) and the launcher's environment into a namespace of plain values.

    The result holds every `dest` of the option table, plus `rank`, `world_size`, `local_rank`, and `given`:
    the sorted names that the command line set itself. With `--use-checkpoint-args` the checkpoint's values
    are merged in between preset and command line. A `single_process` tool passes over Slurm's variables,
    which a batch script has without `srun` too. Nothing is derived or cross-checked yet; that is
    `validate_args`.

    Raises ConfigError for an unknown, refused or malformed option (with the nearest known name or a
    replacement).
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    given, ignored = _parse_given(tokens)
    values = {option.dest: _copy(option.default) for option in OPTIONS}
    values.update(preset_values(given.get("preset")))
    values.update(given)
    _default_null_tokenizer(values, given)
    args = argparse.Namespace(**values)
    args.given = sorted(given)
    _check_ranges(args)
    if args.use_checkpoint_args:
        from metis.training.run_config import load_args_from_checkpoint

        load_args_from_checkpoint(args, set(given))
    args.rank, args.world_size, args.local_rank = _launch_environment(
        os.environ, args, with_slurm=not single_process
    )
    if ignored:
        warn(args, f"accepted for compatibility, without effect here: {', '.join(ignored)}")
    return args


def _default_null_tokenizer(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Mock data need no tokenizer file; and a preset's vocabulary counts the end of document, N does not."""
    if values["mock_data"] and values["tokenizer_type"] is None:
        values["tokenizer_type"] = "NullTokenizer"
    from_preset = values["vocab_size"] is not None and "vocab_size" not in given
    if values["tokenizer_type"] == "NullTokenizer" and from_preset:
        values["vocab_size"] -= 1


def print_args(args: argparse.Namespace) -> None:
    """Print all arguments between rulers, sorted, with dotted leaders, as Megatron's logs have them."""
    print(f"{_RULER} arguments {_RULER}", flush=True)
    for name in sorted(vars(args), key=str.lower):
        print(f"  {name} {'.' * (48 - len(name))} {getattr(args, name)}", flush=True)
    print(f"{_RULER[4:]} end of arguments {_RULER[3:]}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the argparse parser of the option table; it produces only what the command line says."""
    parser = ArgumentParser(
        prog="pretrain_llama.py",
        usage="[torchrun ...] %(prog)s --preset NAME --recipe NAME --data-path PREFIX ... [OPTIONS]",
        description="Pretrain LLaMA-type models in FP4 on megatron-core. Options have Megatron-LM's names.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(*option.flags, **_argparse_settings(option))
    fully = "--no-dist-ckpt-optim-fully-reshardable"
    parser.add_argument(
        fully,
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="save optimizer state without gathering it; loads only at the same TP and PP",
    )
    for flag, has_value in IGNORED.items():
        settings: dict[str, Any] = {"nargs": "?"} if has_value else {"action": "store_true"}
        parser.add_argument(flag, dest=f"ignored{flag}", help=argparse.SUPPRESS, **settings)
    return parser


def _argparse_settings(option: Option) -> dict[str, Any]:
    choices = f"; one of {', '.join(map(str, option.choices))}" if option.choices else ""
    default = option.default
    shown = "none" if default is None else "off" if default is False else "on" if default is True else default
    text = f"{option.help}{choices} [default: {shown}]".replace("%", "%%")
    if option.value is None:
        action = "store_false" if option.default is True else "store_true"
        return {"action": action, "dest": option.dest, "help": text}
    metavar = None if option.nargs else {int: "N", float: "X", str: "VALUE"}.get(option.value)
    return {
        "type": option.value,
        "dest": option.dest,
        "nargs": option.nargs,
        "help": text,
        "metavar": metavar or "VALUE",
    }


def _parse_given(tokens: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what the command line sets, by dest, and the ignored flags it used."""
    known, unknown = build_parser().parse_known_args(tokens)
    for token in unknown:
        if token.startswith("-"):
            _refuse_unknown(token.split("=")[0])
    if unknown:
        raise ConfigError("command line", f"must consist of options, received {unknown[0]!r}; see --help")
    given = vars(known)
    ignored = sorted(name.removeprefix("ignored") for name in given if name.startswith("ignored"))
    return {name: value for name, value in given.items() if not name.startswith("ignored")}, ignored


def _refuse_unknown(flag: str) -> NoReturn:
    why = refusal(flag)
    if why is not None:
        raise ConfigError(flag, f"is a Megatron-LM option that this trainer does not honour: {why}")
    known = [name for option in OPTIONS for name in option.flags]
    raise ConfigError(flag, f"must be a known option{nearest_name(flag, known)}; see --help for all of them")


def _check_ranges(args: argparse.Namespace) -> None:
    """Check choices and bounds of the option table, element by element for lists."""
    for option in OPTIONS:
        value = getattr(args, option.dest)
        if value is None or isinstance(value, bool):
            continue
        for item in value if isinstance(value, list) else [value]:
            _check_value(option, item)


def _check_value(option: Option, item: Any) -> None:
    flag = option.flags[0]
    if option.choices is not None and item not in option.choices:
        why = REFUSED_VALUES.get(flag, {}).get(str(item), "")
        hint = f"; {why}" if why else nearest_name(str(item), map(str, option.choices))
        raise ConfigError(
            flag, f"must be one of {', '.join(map(str, option.choices))}, received {item!r}{hint}"
        )
    if isinstance(item, float) and item != item:
        raise ConfigError(flag, "must be a number, received nan")
    if option.low is not None and item < option.low:
        raise ConfigError(flag, f"must be at least {option.low}, received {item}")
    if option.high is not None and item > option.high:
        raise ConfigError(flag, f"must be at most {option.high}, received {item}")


def _launch_environment(
    env: MutableMapping[str, str], args: argparse.Namespace, *, with_slurm: bool = True
) -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's variables, else Slurm's, else one process.

    Under `srun` without torchrun the torchrun variables are added to `env`, because torch reads them there.
    For `--print-config` outside a launcher the world is WORLD_SIZE or the smallest one that fits the layout.
    """
    if with_slurm and "RANK" not in env and "SLURM_PROCID" in env:
        _slurm_to_torchrun(env)
    if "RANK" in env:
        return tuple(_integer(env, name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))  # type: ignore[return-value]
    if not args.print_config:
        return 0, 1, 0
    smallest = (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    return 0, _integer(env, "WORLD_SIZE", str(smallest)), 0


def _slurm_to_torchrun(env: MutableMapping[str, str]) -> None:
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in env:
        hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        env["MASTER_ADDR"] = _first_host(hosts)
    if "MASTER_PORT" not in env:
        # One port per job: two jobs may share a node.
        env["MASTER_PORT"] = str(_DEFAULT_MASTER_PORT + _integer(env, "SLURM_JOB_ID", "0") % 10000)


def _first_host(hosts: str) -> str:
    """Return the first name of a Slurm host list: `gpu[007-009,012],x` gives `gpu007`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)
    return match.group(1) + (match.group(2) or "") if match else hosts


def _integer(env: Mapping[str, str], name: str, default: str) -> int:
    text = env.get(name, default)
    if not text.isdigit():
        raise ConfigError(
            f"${name}", f"must be a whole number, received {text!r}; launch with torchrun or srun"
        )
    return int(text)


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
