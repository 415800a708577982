"""A small byte-level BPE tokenizer, trained on the data at hand, for models made from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, window: int = 2048
) -> PreTrainedTokenizerFast:
    """Trains on ``texts``; any text round-trips, and every digit is a token of its own.

    The result has at most ``vocab_size`` entries (fewer where the text holds fewer merges), no chat
    template, and saves with ``save_pretrained`` in a form that ``AutoTokenizer`` loads. ``window``
    is the length, in tokens, of the model it is meant for.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"train_tokenizer: vocab_size must be at least {SMALLEST_VOCABULARY} (all bytes and "
            f"the special tokens), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    )
