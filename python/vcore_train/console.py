"""Where the command line writes, and how it keeps other libraries from writing there too."""

import contextlib
import logging
import os
import warnings

from rich.console import Console

from vcore_train.launch import is_main

console = Console(highlight=False, quiet=not is_main())  # of several processes one writes
errors = Console(stderr=True, highlight=False)


def quiet_other_libraries() -> None:
    """Silences progress bars, notices and warnings of the libraries underneath; errors still show.

    For commands only: a library must not change its caller's logging.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when PyTorch is imported
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity_error()
    for name in ("accelerate", "huggingface_hub", "matplotlib", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not is_main():  # the main process says the same
        for name in ("vcore_kernels", "vcore_train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|peft|datasets)\b")
