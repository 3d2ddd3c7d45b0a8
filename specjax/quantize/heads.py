"""EAGLE heads for rotated targets.

A head was trained on the plain target's features; a rotated target emits them in another basis.

EAGLE-1/2 reads final-norm features: gain * x for the plain target, x Q for the rotated one, so y =
(x Q) (diag(gain) Q)^T restores them. The head keeps that matrix as `rms_norm_rotation.weight` (the
layout of SpecMQuant's converter) and applies it to the target's features only: its own, which it
feeds back while drafting, are not rotated. The target's embedding and output head are rotated too,
so the head brings plain ones of its own.

EAGLE-3 reads the residual stream of some layers: h Q restores as h = (h Q) Q^T, which folds into
each part of `fc`, with the gains of norms in front of it. Heads that feed their own output to what reads the target's
(MTP) cannot be folded.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from specjax.checkpoints import base, head_settings, heads, speculators
from specjax.checkpoints.head_folder import HeadFolder
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.files import manifest, source, torch_writer, writer
from specjax.quant import rotation as rotations
from specjax.quant.rotation import Rotation

MATRIX = "rms_norm_rotation.weight"
_EAGLE3_MARK = "hidden_norm.weight"
_SPECULATIVE_TOKENS = 5


def rotate_head(
    head: Path,
    target: base.Checkpoint,
    rotation: Rotation | None,
    output: Path,
    overwrite: bool = False,
) -> Path:
    """Writes the head that drafts for the rotated target as `head` does for the plain one.

    EAGLE-1/2 heads keep their layout (`pytorch_model.bin`); EAGLE-3 heads are written in the
    speculators layout. The manifest records the rotation's id.

    Args:
        head: folder of the head.
        target: the plain model that the head was trained for.
        rotation: of the rotated target; None only changes an EAGLE-3 head's layout.
        output: folder to make.
        overwrite: replaces an existing folder.

    Raises:
        CheckpointError: `head` is no EAGLE head, is rotated already, or `output` is taken.
        ConfigError: widths of head, target and rotation differ.
    """
    writer.check_free(output, overwrite)
    tensors = source.open_source(head)
    names = tensors.names()
    config = file_base.read_json(head / "config.json")
    if MATRIX in names:
        raise CheckpointError(f"{head} is rotated already ({MATRIX}); start from the plain head")
    width = target.config.hidden_size
    if rotation is not None and len(rotation.residual) != width:
        raise ConfigError(
            f"rotation is of order {len(rotation.residual)}, the target's hidden_size is {width}"
        )
    arrays = {name: tensors.read(name) for name in names}
    if any(name.endswith(_EAGLE3_MARK) for name in names):
        arrays, config = _rotate_eagle3(HeadFolder(head), arrays, target, rotation)
    elif "fc.weight" in names and "layers.0.self_attn.q_proj.weight" in names:
        if rotation is None:
            raise ConfigError(f"{head} is an EAGLE-1/2 head: converting it needs rotation")
        arrays |= _plain_ends(arrays, target, ("embed_tokens.weight", "lm_head.weight"))
        arrays[MATRIX] = _matrix(target, rotation)
    else:
        raise CheckpointError(f"{head} is no EAGLE head: no fc.weight beside a decoder layer")
    with writer.whole_folder(output, overwrite) as folder:
        if MATRIX in arrays:
            torch_writer.save(arrays, folder / "pytorch_model.bin")
        else:
            space = writer.header_space(list(arrays), 1)
            writer.write_shards(folder, arrays.items(), shard_bytes=2**40, header_bytes=space)
        writer.write_json(folder / "config.json", config)
        if rotation is not None:
            rotations.save(dataclasses.replace(rotation, heads=None, ffn=None), folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (head / name).is_file():
                shutil.copyfile(head / name, folder / name)
        known = None if rotation is None else rotation.id
        manifest.write(folder, format="eagle", rotation=known, source=head.name)
    return output


def _matrix(target: base.Checkpoint, rotation: Rotation) -> Float[np.ndarray, "D D"]:
    gain = target.tensor("model.norm.weight", (target.config.hidden_size,))
    gain = gain.astype(np.float64) + target.config.norm_offset
    return gain[:, None] * rotation.residual


def _plain_ends(
    arrays: dict[str, np.ndarray], target: base.Checkpoint, wanted: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The target's unrotated embedding and output head, where the head has none of its own."""
    shape = (target.config.vocab_size, target.config.hidden_size)
    tied = target.config.tie_word_embeddings
    names = {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "lm_head.weight": "model.embed_tokens.weight" if tied else "lm_head.weight",
    }
    found = {}
    for name in wanted:
        if name not in arrays:
            values = np.asarray(target.tensor(names[name], shape))
            found[name] = values.astype(arrays["fc.weight"].dtype, copy=False)
    return found


def _rotate_eagle3(
    folder: HeadFolder,
    arrays: dict[str, np.ndarray],
    target: base.Checkpoint,
    rotation: Rotation | None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and configuration in the speculators layout."""
    arrays = {name.replace("midlayer.", "layers.0.", 1): array for name, array in arrays.items()}
    config, width = speculators_config(folder, target), target.config.hidden_size
    if rotation is None:
        return arrays, config
    weight = arrays["fc.weight"]
    if weight.shape[1] % width:
        raise ConfigError(
            f"fc.weight has {weight.shape[1]} inputs, no multiple of the target's hidden_size {width}"
        )
    wide, states = weight.astype(np.float64), weight.shape[1] // width
    # Norms of features keep their statistics under a rotation; their gains go into fc.
    gains = ["input_norm.weight"] if "input_norm.weight" in arrays else []
    gains = gains or [f"fc_norm.{j}.weight" for j in range(states) if "fc_norm.0.weight" in arrays]
    if gains:
        wide = wide * np.concatenate([arrays[name].astype(np.float64) for name in gains])
        arrays |= {name: np.ones_like(arrays[name]) for name in gains}

    def turned(rows: np.ndarray) -> np.ndarray:
        return (rows.reshape(-1, states, width) @ rotation.residual).reshape(rows.shape)

    arrays["fc.weight"] = turned(wide).astype(weight.dtype)
    if "mask_hidden" in arrays:
        mask = arrays["mask_hidden"]
        arrays["mask_hidden"] = turned(mask.astype(np.float64)).astype(mask.dtype)
    if len(weight) == width:
        arrays |= _plain_ends(arrays, target, ("embed_tokens.weight", "lm_head.weight"))
    return arrays, config


def speculators_config(folder: HeadFolder, target: base.Checkpoint) -> dict[str, Any]:
    """config.json of an EAGLE-3 head in the speculators layout, from one of any layout."""
    if folder.says is not None:
        return folder.raw
    shape = folder.shape()
    num_drafts, _ = head_settings.draft_offsets(folder, shape.vocab_size)
    length = head_settings.draft_length(
        folder, "num_speculative_tokens", "ttt_length", default=_SPECULATIVE_TOKENS
    )
    return speculators.head_config(
        "eagle3",
        speculators.layer_config(shape),
        length,
        (target.config.architecture, None),
        folder.tensors.dtype("fc.weight").name,
        draft_vocab_size=num_drafts,
        eagle_aux_hidden_state_layer_ids=list(
            head_settings.layer_ids(folder, target.config.num_layers)
        ),
        target_hidden_size=target.config.hidden_size,
        **dataclasses.asdict(heads.variant(folder)),
    )


def check_pair(target: Path, head: Path, tensors: file_base.TensorSource | None = None) -> None:
    """Refuses a head whose rotation is not its target's.

    Rotations are known from the manifest that specjax writes or from a rotation file in the folder.
    A rotated head without either (SpecMQuant's) is compared with the target's Q, and accepted where
    the target's is not recorded.

    Args:
        tensors: of the head; None: they are opened.

    Raises:
        CheckpointError: one of them is rotated and the other is not, or by another Q.
    """
    wanted, found = _known(target), _known(head)
    tensors = source.open_source(head) if tensors is None else tensors
    matrix = tensors.read(MATRIX) if MATRIX in tensors.names() else None
    if wanted is None and found is None and (matrix is None or _has_unit_gain(target)):
        return
    hint = (
        "convert the plain head: python -m experiments.convert --head=DIR --source=PLAIN_TARGET "
        "--rotation=TARGET/rotation.safetensors --output=DIR"
    )
    if found is None and matrix is None:
        raise CheckpointError(
            f"draft head {head} is not rotated, but the target {target} is (rotation {wanted}); {hint}"
        )
    if wanted is None:
        raise CheckpointError(
            f"draft head {head} is for a rotated target ({found or 'it brings a matrix'}), but "
            f"{target} is not rotated; use the plain head"
        )
    same = wanted == found if found is not None else _matches(matrix, target)
    if not same:
        raise CheckpointError(
            f"draft head {head} is for another rotation ({found or 'by its matrix'}) than the target "
            f"{target} ({wanted}); {hint}"
        )


def _known(folder: Path) -> str | None:
    """Id of a folder's rotation, or None where nothing says that it is rotated."""
    if not folder.is_dir():
        return None
    written = manifest.read(folder)
    if written is not None:
        return written.get("rotation")
    file = rotations.find(folder)
    return None if file is None else rotations.load(file).id


def _has_unit_gain(target: Path) -> bool:
    """Whether the final norm has gain 1, as rotated models do: then nothing contradicts a
    rotation.
    """
    if not target.is_dir():
        return False
    tensors, name = source.open_source(target), "model.norm.weight"
    return name in tensors.names() and bool(np.all(tensors.read(name) == 1))


def _matches(matrix: Float[np.ndarray, "D D"], target: Path) -> bool:
    """Whether the rows of diag(gain) Q are multiples of the target's Q."""
    file = rotations.find(target)
    if file is None:
        return True
    q, rows = rotations.load(file).residual, matrix.astype(np.float64)
    if q.shape != rows.shape:
        return False
    products = np.sum(rows * q, axis=1)
    parallel = np.allclose(np.abs(products), np.linalg.norm(rows, axis=1), rtol=1e-3, atol=1e-6)
    # Rotations of one Hadamard matrix differ in the signs of rows only; gains are hardly ever
    # negative.
    return bool(parallel and np.mean(products > 0) > 0.9)
