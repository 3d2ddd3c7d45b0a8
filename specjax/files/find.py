"""Which files of a folder, or of a repository's listing, hold the weights of its model."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from specjax.errors import CheckpointError
from specjax.files import base

STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_gptq.safetensors",
    "model_gptq_marlin.safetensors",
    "quant_model.safetensors",
    "quant_model.pt",
)
"""In order of preference; the first four in transformers' order."""

_KINDS = ((".safetensors",), (".bin", ".pt", ".pth"))
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# What else stands in model folders under these suffixes: adapters, training states, heads, rotations of ours.
_OTHER = re.compile(
    r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state|random_states|medusa_lm_head|rotation|"
    r"imatrix|consolidated)\b.*|.*\.(optimizer|scheduler)\.\w+"
)
MISTRAL = "consolidated.safetensors"


def weight_files(
    files: Collection[str],
    where: str,
    names: Sequence[str] = STANDARD_NAMES,
    stated: str | None = None,
) -> tuple[str, ...]:
    """The weight file or index of a model, or all of its shards where they have no index.

    The first of `names` that is there; else the file that the settings state; else the only one that can be it:
    safetensors before pickles, whatever their name.

    Args:
        files: names in the folder.
        where: the folder, for messages.
        names: that win over all others.
        stated: `model_file_base_name` of AutoGPTQ's settings.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: several could be meant, or shards are missing.
    """
    standard = next((name for name in names if name in files), None)
    named = None if stated is None else _stated_file(files, stated)
    if standard and named and standard.partition(".")[0] != named[0].partition(".")[0]:
        raise CheckpointError(
            f"{where} has the weights {standard}, and {named[0]}, which model_file_base_name={stated!r} of "
            "quantize_config.json states: keep the ones that are meant"
        )
    if standard:
        return (standard,)
    if named:
        return named
    for suffixes in _KINDS:
        if found := _sole(files, suffixes, where):
            return found
    if MISTRAL in files:
        return (MISTRAL,)
    raise FileNotFoundError(
        f"no weights in {where}: looked for {', '.join(names)}, and for one other .safetensors, .bin, .pt or .pth file"
    )


def stated_name(folder: Path) -> str | None:
    """`model_file_base_name` of quantize_config.json, or of `quantization_config` in config.json; None without one.

    Raises:
        CheckpointError: it is not the name of a file.
    """
    for file in ("quantize_config.json", "config.json"):
        if not (folder / file).is_file():
            continue
        config = base.read_json(folder / file)
        settings = config if file != "config.json" else config.get("quantization_config")
        name = settings.get("model_file_base_name") if isinstance(settings, dict) else None
        if name is None or name == "":
            continue
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{folder / file}: model_file_base_name={name!r} is not the name of a file"
            )
        return name
    return None


def _stated_file(files: Collection[str], stem: str) -> tuple[str, ...] | None:
    """The file `stem`, with or without its suffix, or its shards."""
    for suffix in (suffix for kind in _KINDS for suffix in kind):
        for name in (stem, f"{stem}{suffix}", f"{stem}{suffix}.index.json"):
            if name in files and name.endswith((suffix, f"{suffix}.index.json")):
                return (name,)
        shards = [match for match in _shards(files, (suffix,)) if match["stem"] == stem]
        if shards:
            return _complete(shards, stem)
    return None


def _sole(files: Collection[str], suffixes: tuple[str, ...], where: str) -> tuple[str, ...] | None:
    """The only index, file or set of shards of a kind; None if there is none."""
    indices = [
        (f,) for f in files if f.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))
    ]
    shards: dict[str, list[re.Match]] = {}
    for match in _shards(files, suffixes):
        shards.setdefault(match.expand(r"\g<stem>-\g<count>\g<suffix>"), []).append(match)
    single = [
        (file,)
        for file in files
        if file.endswith(suffixes) and not _SHARD.fullmatch(file) and not _OTHER.fullmatch(file)
    ]
    sets = [] if indices else [tuple(m.string for m in found) for found in shards.values()]
    found = sorted([*indices, *single, *sets])
    if len(found) > 1:
        raise CheckpointError(
            f"{where} has several files of weights, and nothing says which are the model's: "
            f"{', '.join(names[0] for names in found)}; keep one, or name it model{suffixes[0]}"
        )
    if not found:
        return None
    return _complete(next(iter(shards.values())), where) if found[0] in sets else found[0]


def _shards(files: Collection[str], suffixes: tuple[str, ...]) -> Iterator[re.Match]:
    for file in sorted(files):
        match = _SHARD.fullmatch(file)
        if match and match["suffix"] in suffixes and not _OTHER.fullmatch(file):
            yield match


def _complete(shards: list[re.Match], where: str) -> tuple[str, ...]:
    """The names of all shards; they have no index that could say what a missing one holds."""
    first = shards[0]
    count, found = int(first["count"]), {match.string for match in shards}
    wanted = [f"{first['stem']}-{i + 1:05d}-of-{count:05d}{first['suffix']}" for i in range(count)]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            f"{where} has shards {first.string}, ... without an index, and missing are {', '.join(missing)}"
        )
    return tuple(wanted)
