"""`specjax.convert`: quantizes, rotates and changes the format of models; converts heads for
rotated targets.
"""

import dataclasses
import hashlib
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from specjax import checkpoints
from specjax.checkpoints import base, export, inventory
from specjax.config import DTYPES, ModelConfig
from specjax.depth import build as routing
from specjax.errors import ConfigError, SpecjaxError
from specjax.files import hub, manifest, writer
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.quant import rotation as rotations
from specjax.quant.rotation import Rotation
from specjax.quantize import calibration, heads, layerwise, quantize, recipe, rtn, selfcheck
from specjax.quantize import rotate as rotating
from specjax.quantize.recipe import Recipe
from specjax.quantize.workdir import WorkDir
from specjax.text import tokenizer

_log = logging.getLogger(__name__)

_SIDE_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion made and how far it is from its source.

    Attributes:
        output: the folder.
        format: of the linears.
        scheme: of the linears, or None if they are dense.
        rotation: id of the rotation in the weights, or None.
        num_bytes: size of all files.
        seconds: wall time.
        reload_error: RMS difference of the logits of the written folder, read back, from those of
            the model in memory, relative to their RMS.
        source_error: the same between the written model and its source.
        agreement: share of positions where both have the same most likely token.
        probe: what these errors are measured on: "calibration text", "English text" or "random tokens" (without a
            tokenizer).
    """

    output: Path
    format: str
    scheme: str | None
    rotation: str | None
    num_bytes: int
    seconds: float
    reload_error: float
    source_error: float
    agreement: float
    probe: str


def convert(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "specjax",
    scheme: str | None = None,
    method: str | None = None,
    head_scheme: str = recipe.DENSE_HEAD,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
    clip: bool | None = None,
    smooth_strength: float | None = None,
    rotate: bool = False,
    rotation: str | Path | None = None,
    calibration_file: str | Path | None = None,
    calibration_samples: int = 64,
    calibration_tokens: int = 512,
    seed: int = 0,
    dtype: str | None = None,
    layout: str = "safetensors",
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Writes a model in another format, quantized or rotated on the way, and checks the result by
    reading it back.

    Without `scheme` the linears keep their codes (or stay dense). Interrupted calibrated runs
    resume when called again with the same arguments. The same arguments give the same codes.

    Args:
        source: as for `specjax.load`.
        output: folder to make.
        format: "gptq", "compressed-tensors", "qqq", "qserve", "specjax", or "dense".
        scheme: what to quantize to; see `specjax.quant.scheme.SCHEMES`.
        method: "rtn", "gptq", "smoothquant", "qqq" or "qoq"; None is gptq with a calibration file, else
            rtn.
        head_scheme: scheme of the output head; "dense" leaves it as it is.
        group_size, symmetric, act_order, damping, clip: see `specjax.quantize.recipe.make`.
        smooth_strength: migration strength of smoothquant, qqq and qoq.
        rotate: rotate the model first (QuaRot); for 4-bit activations with run-time products
            (format "specjax" only).
        rotation: rotation file to use in place of a new random one.
        calibration_file: .txt, .json or .jsonl; see `specjax.quantize.calibration.read_documents`.
        calibration_samples, calibration_tokens: windows, and tokens of each.
        seed: of the rotation and of the choice of calibration text.
        dtype: of embeddings, norms and dense linears; None is what the source states.
        layout: "safetensors", or "orbax" for format "specjax".
        overwrite: replace an existing output.
        progress: show a bar.

    Raises:
        ConfigError: unknown names, or a combination that is not supported; raised before long work.
        CheckpointError: the source is damaged or holds tensors that the model does not have, the format cannot hold
            the linears, or the check failed.
        FileNotFoundError: the source or the calibration file does not exist.
    """
    started = time.monotonic()
    output = Path(output)
    _check_names(format, dtype)
    writer.check_free(output, overwrite)
    chosen = None
    if scheme is not None:
        method = method or ("rtn" if calibration_file is None else "gptq")
        chosen = recipe.make(
            *(scheme, method),
            head_scheme=head_scheme,
            group_size=group_size,
            symmetric=symmetric,
            act_order=act_order,
            damping=damping,
            clip=clip,
            strength=smooth_strength,
        )
    elif method is not None or group_size is not None or head_scheme != recipe.DENSE_HEAD:
        raise ConfigError("method, group_size and head_scheme quantize: say to which scheme")
    if chosen is not None and chosen.needs_calibration and calibration_file is None:
        raise ConfigError(
            f"method={method!r} needs calibration_file; without one, use method='rtn'"
        )
    path = hub.resolve(source)
    checkpoint = checkpoints.open_checkpoint(path)
    if chosen is not None:
        _check_recipe(chosen, checkpoint.config, format)
    if rotate or rotation is not None:
        rotating.check_architecture(checkpoint.config)
    text = _tokenizer(path, checkpoint, needed=calibration_file is not None)
    windows = None
    if chosen is not None and chosen.needs_calibration:
        windows = _windows(calibration_file, text, calibration_samples, calibration_tokens, seed)
    module, stored = _load(path, checkpoint, chosen is not None or rotate or rotation is not None)
    kind, probe = selfcheck.probe_tokens(windows, text, checkpoint.config, seed)
    source_logits = selfcheck.logits(module, probe)
    if rotate or rotation is not None:
        module, stored = _rotate(module, stored, chosen, rotation, seed)
    if stored is not None and stored.online and format != "specjax":
        raise ConfigError(
            f"format={format!r} cannot hold a model with run-time rotations (4-bit activations); "
            "use format='specjax'"
        )
    if chosen is not None:
        work = _work(output, path, chosen, windows, stored) if chosen.needs_calibration else None
        module = quantize.quantize(module, chosen, windows, work=work, progress=progress)
    dtype = dtype or checkpoint.config.dtype
    _write(
        module,
        output,
        path,
        text,
        stored,
        dict(format=format, dtype=dtype, layout=layout),
        overwrite,
    )
    errors = selfcheck.verify(module, output, format, dtype, probe, source_logits)
    if chosen is not None and chosen.needs_calibration:
        work.remove()
    return Conversion(
        output=output,
        format=format,
        scheme=_scheme_name(module) if format != export.DENSE else None,
        rotation=None if stored is None else stored.id,
        num_bytes=sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        seconds=time.monotonic() - started,
        probe=kind,
        **errors,
    )


def convert_head(
    head: str | Path,
    source: str | Path,
    rotation: str | Path | None,
    output: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes an EAGLE head for the rotated form of its target; see
    `specjax.quantize.heads.rotate_head`.

    Args:
        head: folder of the plain head.
        source: the plain target.
        rotation: rotation file of the rotated target; None only brings an EAGLE-3 head into the
            speculators layout.
        output: folder to make.
        overwrite: replace an existing output.
    """
    if not Path(head).is_dir():
        raise FileNotFoundError(f"head={head}: no such folder")
    target = checkpoints.open_checkpoint(hub.resolve(source))
    stored = None if rotation is None else rotations.load(Path(rotation))
    return heads.rotate_head(Path(head), target, stored, Path(output), overwrite)


def _check_names(format: str, dtype: str | None) -> None:
    if format not in export.FORMATS:
        raise ConfigError(f"format={format!r} is unknown; supported: {', '.join(export.FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; supported: {', '.join(DTYPES)}")


def _check_recipe(chosen: Recipe, config: ModelConfig, format: str) -> None:
    """Tries the format on linears of zeros of the model's shapes: it refuses what it cannot
    hold.
    """
    recipe.check_model(chosen, config)
    if format == export.DENSE:
        return
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads_width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    shapes = {
        "self_attn.q_proj": (heads_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, heads_width),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for name, shape in shapes.items():
        linear = rtn.quantize(jnp.zeros(shape, jnp.float32), chosen.scheme, chosen.group_size)
        export.PACKERS[format].check(linear, f"model.layers.0.{name}")
    if chosen.head is not None:
        rows = jnp.zeros((config.vocab_size, hidden), jnp.float32)
        export.PACKERS[format].check(rtn.quantize(rows, chosen.head), "lm_head")


def _tokenizer(path: Path, checkpoint: base.Checkpoint, needed: bool):
    """The source's tokenizer; where it is only wanted for a comparison, one that cannot be read is no error."""
    try:
        return tokenizer.load(path, checkpoint)
    except SpecjaxError as error:
        if needed or not path.is_dir():
            raise
        _log.warning("%s; the result is compared on random tokens", error)
        return None


def _windows(
    file: str | Path, text: Any, samples: int, tokens: int, seed: int
) -> Int[np.ndarray, "S T"]:
    if text is None:
        raise ConfigError(
            "calibration_file needs a tokenizer, and the source has no tokenizer files"
        )
    documents = calibration.read_documents(Path(file), text)
    return calibration.windows(documents, samples, tokens, seed, str(file))


def _load(path: Path, checkpoint: base.Checkpoint, decode: bool) -> tuple[Llama, Rotation | None]:
    """The model, dense in float32 if it is to be changed, and the rotation that it comes with."""
    module = llama.build(checkpoint, jnp.dtype("float32" if decode else checkpoint.config.dtype))
    module = routing.attach(module, checkpoint.config, routing.policy(checkpoint))
    inventory.check(checkpoint)
    module = rotating.attach_from(module, path)
    written = manifest.read(path) if path.is_dir() else None
    file = rotations.find(path) if path.is_dir() else None
    stored = rotations.load(file) if file is not None else None
    if stored is not None and written is not None and written.get("rotation") is None:
        stored = None
    if not decode:
        return module, stored
    if stored is not None and stored.online:
        raise ConfigError(f"{path} has run-time rotations; start from the model it was made from")
    names = _scheme_name(module)
    if names is not None:
        _log.warning(
            "%s is quantized already (%s): its decoded weights are the source", path, names
        )
    return layerwise.decoded(module), stored


def _rotate(
    module: Llama,
    stored: Rotation | None,
    chosen: Recipe | None,
    file: str | Path | None,
    seed: int,
) -> tuple[Llama, Rotation]:
    if stored is not None:
        raise ConfigError(f"the source is rotated already (rotation {stored.id}); drop rotate")
    spec = None if chosen is None else chosen.scheme.activations
    online = spec is not None and spec.bits == 4
    made = None if file is None else rotations.load(Path(file))
    made = made or rotations.random_hadamard(module.config, seed, online)
    gain = np.asarray(module.model.norm.gain, np.float64)
    made = dataclasses.replace(made, norm_gain=gain)
    return rotating.rotate(module, made), made


def _work(
    output: Path, source: Path, chosen: Recipe, windows: np.ndarray, stored: Rotation | None
) -> WorkDir:
    """Layers of this very conversion that an interrupted run has finished."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    fingerprint = {
        "recipe": repr(chosen),
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "rotation": None if stored is None else stored.id,
    }
    path = output.absolute()
    return WorkDir.open(path.with_name(f".{path.name}.work"), fingerprint)


def _write(module, output, source, text, stored, settings, overwrite) -> None:
    """Exports; tokenizer files and the rotation go beside the weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_side_files(source, text, folder)
        if stored is not None:
            rotations.save(stored, folder)
        export.export(
            *(module, module.config, output),
            extra_files=sorted(folder.iterdir()),
            rotation=None if stored is None else stored.id,
            source=source.name,
            overwrite=overwrite,
            **settings,
        )


def copy_side_files(source: Path, text, folder: Path) -> None:
    """Puts the tokenizer and generation files of a model folder, or of a GGUF file's tokenizer, into a folder."""
    if source.is_dir():
        for name in _SIDE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif text is not None:
        text.save(folder)


def _scheme_name(module: Llama) -> str | None:
    names = sorted({linear.scheme.name for linear in selfcheck.quantized(module)})
    return ", ".join(names) or None
