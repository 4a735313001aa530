"""`python sampling.py MODEL ["question"]`: ask a model one question, or talk to it."""
import sys

from huggingface_hub import utils as hub_utils
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from harness.commands.flags import conversation_arguments
from harness.engine.chat import Chat
from harness.lines import visible
from harness.loading import load
from sampling import sample, stop_tokens


def converse(model, tokenizer, settings):
    """Answer what is asked, each answer as it is written, until an empty line."""
    print("An empty line ends the conversation.", file=sys.stderr)
    turns, chat, stops = [], Chat(tokenizer), stop_tokens(model, tokenizer)
    while question := input("> ").strip():
        shown = ""

        def show(text, end=""):
            nonlocal shown
            if end or not text.endswith("\ufffd"):  # half of a character
                print(visible(text[len(shown):]), end=end, flush=True)
                shown = text

        turns.append(question)
        (answer,), = sample(model, tokenizer, [turns], **settings, on_token=lambda i, number, ids:
                            show(chat.written([i for i in ids if i not in stops])))
        show(answer.text, end=ending(answer))
        turns.append(answer.text)


def ending(answer):
    return "\n" if answer.finished else f" [cut off after {len(answer.tokens)} tokens]\n"


def main():
    """`python sampling.py MODEL ["question"]`."""
    args = conversation_arguments()
    names = "max_new_tokens", "temperature", "top_p", "seed"
    settings = {name: getattr(args, name) for name in names}
    transformers_logging.disable_progress_bar()  # of loading, and of downloads as well
    hub_utils.enable_progress_bars()
    try:
        model, tokenizer = load(args.model, bits=args.bits)
        if args.question is None:
            return converse(model, tokenizer, settings)
        answers, = sample(model, tokenizer, [args.question], args.n, **settings)
    except (EOFError, KeyboardInterrupt) as end:
        sys.exit(print() if isinstance(end, EOFError) else 130)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for number, answer in enumerate(answers, 1):
        print(f"[{number}] " * (args.n > 1) + visible(answer.text), end=ending(answer))
