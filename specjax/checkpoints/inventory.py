"""What a checkpoint stores against what a model was built of: a tensor that nobody read is a part that was dropped.

No flag of a configuration enters here. Tensors that change no output are left out: buffers that can be computed, scales
of caches, empty tensors, zeros where a bias or zero point may stand, an output head that repeats the embedding; and
parts that are no language model (vision towers, multi-token predictors).
"""

import logging
import re
from collections.abc import Sequence

import numpy as np

from specjax.checkpoints import tensors
from specjax.checkpoints.names import Names
from specjax.errors import CheckpointError

_log = logging.getLogger(__name__)

_BUFFERS = re.compile(
    r".*(rotary_emb\.\w+|rotary_pos_emb\.\w+|masked_bias|position_ids|\.attn\.bias|\.[kvq]_(scale|zero_point)|"
    r"\.(input|output)_(scale|zero_point)|rope_freqs\.weight|rope_factors_\w+\.weight)"
)
_OTHER_MODELS = re.compile(
    r"(.*\.)?(mtp\w*|vision\w*|visual|audio\w*|multi_modal_projector|image_newline|eh_proj|enorm|hnorm|shared_head)\..*"
)
_ZERO_IS_NOTHING = re.compile(r".*(bias|zero_point|szeros)")
_LAYER = re.compile(r"(?:blk|(?:\w+\.)*(?:layers|h))\.(\d+)\.")
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"


def unread(checkpoint) -> tuple[str, ...]:
    """Names of stored tensors that belong to the model and were not read.

    Args:
        checkpoint: one of `open_checkpoint`, after a model was built of it.
    """
    source = _source(checkpoint)
    names = Names(checkpoint.config, source.names())
    head, embedding = f"{names(_HEAD)}.weight", names(_EMBEDDING)

    def repeats_embedding(name: str) -> bool:
        """A head that is stored beside tied embeddings; GGUF files give no values by name."""
        is_head = name == head and hasattr(source, "read")
        return is_head and tensors.same_values(source, head, embedding)

    return tuple(
        name
        for name in source.unread()
        if not (_says_nothing(source, name) or repeats_embedding(name))
    )


def unread_of_head(source) -> tuple[str, ...]:
    """Names of the tensors of a draft head's files that were not read and say something."""
    return tuple(
        name
        for name in source.unread()
        if not _BUFFERS.fullmatch(name)
        and 0 not in source.shape(name)
        and not _is_zero(source, name)
    )


def check(checkpoint) -> None:
    """Raises CheckpointError, naming them, if tensors of the model were not read."""
    if names := unread(checkpoint):
        raise CheckpointError(_message(checkpoint, names))


def warn(checkpoint, ignore: str | None = None) -> None:
    """As `check`, with a warning; names that contain `ignore` are left out on purpose."""
    names = [name for name in unread(checkpoint) if ignore is None or ignore not in name]
    if names:
        _log.warning("%s", _message(checkpoint, names))


def check_layers(checkpoint) -> None:
    """Raises CheckpointError if the files do not hold as many layers as the configuration counts."""
    source, count = _source(checkpoint), checkpoint.config.num_layers
    found = {
        int(match[1]): name
        for name in source.names()
        if not _OTHER_MODELS.match(name) and (match := _LAYER.match(name))
    }
    # A layer that predicts further tokens stands behind the model's own.
    predictors = {
        int(match[1])
        for name in source.names()
        if _OTHER_MODELS.match(name) and (match := _LAYER.match(name))
    }
    layers = sorted(set(found) - predictors)
    if not layers or layers[-1] + 1 == count:
        return
    says = f"its configuration says num_hidden_layers (block_count) = {count}"
    if layers[-1] >= count:
        raise CheckpointError(
            f"{checkpoint.path} holds {found[layers[-1]]}, but {says}: state {layers[-1] + 1}, or remove the tensors"
        )
    raise CheckpointError(
        f"{checkpoint.path}: layer {layers[-1] + 1} is missing: the last one stored has {found[layers[-1]]}, but {says}"
    )


def _source(checkpoint):
    return checkpoint.file if checkpoint.format == "gguf" else checkpoint.source


def _message(checkpoint, names: Sequence[str]) -> str:
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{checkpoint.path}: {len(names)} stored tensors are not part of the model as its configuration describes it "
        f"({some}); without them it computes something else, or they do not belong there"
    )


def _says_nothing(source, name: str) -> bool:
    if _BUFFERS.fullmatch(name) or _OTHER_MODELS.fullmatch(name):
        return True
    if not hasattr(source, "read"):
        return False
    if 0 in source.shape(name):
        return True
    return _is_zero(source, name)


def _is_zero(source, name: str) -> bool:
    """Whether zeros stand where a bias or zero point may."""
    return bool(_ZERO_IS_NOTHING.fullmatch(name)) and not np.any(source.read(name))
