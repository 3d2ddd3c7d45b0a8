"""SentencePiece model files (tokenizer.model), read with the protocol buffers that `transformers` brings."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specjax.errors import CheckpointError, ConfigError
from specjax.text import pipelines

_BPE = 2  # TrainerSpec.ModelType


def read(
    path: Path,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
    specials: Mapping[str, str | None] = MappingProxyType({}),
    spaces: str | None = None,
    added: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
):
    """The pipeline of a SentencePiece model file (tokenizer.model): BPE without text normalization.

    Args:
        add_bos, add_eos: put BOS before a text, EOS behind it.
        specials: special tokens by their Hugging Face names, where they are not the model's own; None: there is none.
        spaces: where a text that begins without a space gets one: "first", "always" (behind every special token too)
            or "never"; None: SentencePiece's own rule, which asks the model, and adds one to a text that has one.
        added: tokens by id, as fields of `tokenizers.AddedToken`; they replace the model's own of the same id.
    Returns:
        (tokenizers.Tokenizer, special tokens by their Hugging Face names).
    Raises:
        ConfigError: another kind of model, or a needed package is missing.
        CheckpointError: the file is not a SentencePiece model, or the added tokens contradict it.
    """
    from tokenizers import pre_tokenizers

    proto = _proto(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _BPE or normalizer.precompiled_charsmap:
        raise ConfigError(
            f"{path}: SentencePiece model_type = {trainer.model_type}, normalization "
            f"{normalizer.name!r}: only BPE (2) without normalization is supported; add tokenizer.json"
        )
    tokens = [piece.piece for piece in proto.pieces]
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    own = {f"{name}_token": tokens[i] for name, i in ids.items() if 0 <= i < len(tokens)}
    space = normalizer.add_dummy_prefix if spaces is None else spaces != "never"
    backend = pipelines.sentencepiece(
        tokens,
        [piece.type for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        space,
        str(path),
        added,
    )
    if spaces is not None:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(pipelines.SPACE, spaces, split=False)
    specials = {name: token for name, token in {**own, **specials}.items() if token is not None}
    ends = [
        token if wanted and backend.token_to_id(token or "") is not None else None
        for token, wanted in (
            (specials.get("bos_token"), add_bos),
            (specials.get("eos_token"), add_eos),
        )
    ]
    pipelines.add_ends(backend, *ends)
    return backend, specials


def _proto(path: Path):
    try:
        from google.protobuf.message import DecodeError
        from transformers.convert_slow_tokenizer import import_protobuf

        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading it needs the protobuf package (pip install protobuf); or add tokenizer.json"
        ) from error
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(
            f"{path}: not a SentencePiece model, or truncated: {error}"
        ) from error
    if not proto.pieces:
        raise CheckpointError(f"{path}: the SentencePiece model has no pieces")
    return proto
