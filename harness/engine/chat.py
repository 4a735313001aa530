"""Chats as token ids: a tokenizer's own template around texts that are data."""
import functools
import itertools
import re


class Chat:
    """A tokenizer's chat template around texts that are data: no text can make a control token.

    Templates that can leave thinking out are asked to, and those that tell the date tell the same
    one every day. Raises ValueError for a tokenizer without a template, and for a template that
    does not take plain texts, has no token that ends an answer, or lets the model think or choose
    a channel before every answer: what is judged here is the answer. Where a template's marks are
    plain text and no tokens, a text can spell them.
    """

    SLOT = "Zq{}SLOTqZ"  # stands where a text will
    DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
    NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")  # how templates say that there is none

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: choose an instruction-tuned "
                             "model")
        self.tokenizer = tokenizer
        # Gemma adds line breaks, which control nothing.
        self.added = {text: i for text, i in tokenizer.get_added_vocab().items()
                      if i != tokenizer.unk_token_id and len(text.strip()) > 1}
        self.added_ids = set(self.added.values())
        longest_first = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.frame, self.encode_once = map(functools.cache, (self.frame, self.encode))  # of pieces
        (_, self.asked), _ = self.frame(1)
        (*before, after), (_, self.trims) = self.frame(2)
        self.check_thinking(before[1])
        # An answer stands between these; Mistral's template puts a space before it, for example.
        self.lead = before[1][len(self.asked):] if before[1].startswith(self.asked) else ""
        self.end = next(iter(self.control(self.encode(after))), tokenizer.eos_token_id)
        if self.end is None:
            raise ValueError("the chat template ends answers with no token, and the tokenizer has "
                             "no eos_token: choose another model")
        mark = tokenizer.convert_ids_to_tokens(self.end)
        self.tail = after.partition(mark)[0] if mark in after else ""  # Llama-2's is a space
        self.mark = mark * (mark in after)
        frame = self.encode(self.NO_THOUGHT.sub("", "".join([*before, after, self.asked])))
        self.marks = {self.end, *self.control(frame), *tokenizer.all_special_ids}

    def check_thinking(self, before):
        """Raise ValueError unless what the template puts before an answer asks for one at once.

        before: what stands before an answer that is there.
        """
        if "<think>" in self.asked.rpartition("</think>")[2]:
            raise ValueError("the chat template lets the model think aloud before every answer: "
                             "choose a model that answers at once")
        asked, without_thought, there = (self.control(self.encode(text)) for text in (
            self.asked, self.NO_THOUGHT.sub("", self.asked), before))
        if there not in (asked, without_thought):
            marks = self.tokenizer.decode([i for i in there if i not in asked] or asked)
            raise ValueError("the chat template puts other control tokens before an answer that "
                             f"is there than before one that is asked for ({marks}), so the model "
                             "thinks, or chooses a channel, before it answers: choose a model that "
                             "answers at once")

    def render(self, count):
        """The template around `count` turns, with a slot in the place of each text.

        It asks for an answer if the last turn is the user's.
        """
        turns = [{"role": ("user", "assistant")[i % 2], "content": f"\t{self.SLOT.format(i)}\t"}
                 for i in range(count)]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.DAY + self.tokenizer.get_chat_template(), tokenize=False,
                add_generation_prompt=count % 2 == 1, enable_thinking=False)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError("the chat template takes no plain chat of user and assistant "
                             f"({error}): choose another model") from None
        if any(text.count(turn["content"].strip()) != 1 for turn in turns):
            raise ValueError("the chat template does not put each text of a chat in one place: "
                             "choose another model")
        return text

    def frame(self, count):
        """What the template puts before, between and after `count` turns: count + 1 texts.

        And for each turn whether the template strips its text, as Llama-3's does.
        """
        rest, pieces, trims = self.render(count), [], []
        for slot in map(self.SLOT.format, range(count)):
            trims.append(f"\t{slot}\t" not in rest)
            before, rest = re.split(f"\t?{slot}\t?", rest)  # some strip one side only
            pieces.append(before)
        return [*pieces, rest], trims

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def control(self, ids):
        """The control tokens among ids."""
        return [i for i in ids if i in self.added_ids]

    def encode_behind(self, before, text):
        """Token ids of a text where another one stands before it.

        SentencePiece would begin a text that stands alone with a space. Where both together are
        cut into other tokens than they are one by one, a line break stands in for the text before.
        """
        for start in (before, "\n"):
            known, whole = self.encode_once(start), self.encode(start + text)
            if whole[:len(known)] == known:
                return whole[len(known):]
        return self.encode(text)

    def cut(self, text):
        """A text in parts, so that each control token that it spells is cut in two."""
        parts = []
        while self.added and (token := self.pattern.search(text)):
            parts.append(text[:token.start() + 1])
            text = text[token.start() + 1:]
        return [*parts, text]

    def encode_parts(self, before, parts):
        """Token ids of the parts of a text that stands behind another one."""
        places = itertools.chain([before], itertools.repeat("\n"))
        return [i for place, part in zip(places, parts) for i in self.encode_behind(place, part)]

    def text(self, text, before="\n"):
        """Token ids of a text as data: control tokens in it are characters."""
        text = printable(text)
        ids = self.encode_parts(before, self.cut(text))
        # The tokenizer's normalizer may have made one of other characters.
        return self.encode_parts("\n", [*text]) if self.control(ids) else ids

    def chat(self, *turns):
        """Token ids of a chat, which asks for an answer if the user speaks last.

        turns: texts, the user's and the assistant's in turn. The ids are the template's own, but
        where a text spells a control token.
        """
        (first, *others), trims = self.frame(len(turns))
        texts = [printable(text.strip() if trim else text) for text, trim in zip(turns, trims)]
        parts = [first]
        for text, piece in zip(texts, others):
            begin, *rest = self.cut(text)
            parts = [*parts[:-1], parts[-1] + begin, *rest]
            parts[-1] += piece
        whole = self.encode(parts[0]) + self.encode_parts("\n", parts[1:])
        frame = sum(map(self.encode_once, others), self.encode_once(first))
        if self.control(whole) == self.control(frame):
            return whole
        ids = self.encode_once(first)  # a text and its neighbours, or the normalizer, have made one
        for before, text, piece in zip([first, *others], texts, others):
            ids = ids + self.text(text, before) + self.encode_behind("\n", piece)
        return ids

    def prompt(self, *turns):
        """Token ids of a chat that asks for an answer; the first and the last turn are the user's.

        Raises ValueError for any other turns.
        """
        if len(turns) % 2 == 0 or not all(isinstance(text, str) for text in turns):
            raise ValueError("a chat must be texts, the user's first and last")
        return self.chat(*turns)

    def answer(self, text):
        """Token ids of an assistant's finished answer, the end token included.

        They are what the template puts behind the prompt. What a model drew may be cut otherwise,
        even if it is the same text: train on the ids that were drawn (`Sample.tokens`).
        """
        text = self.lead + printable(text.strip() if self.trims else text) + self.tail
        *parts, last = self.cut(text)
        ids = self.encode_parts(self.asked, [*parts, last + self.mark])
        if self.control(ids) == [self.end] == ids[-1:]:
            return ids
        return self.text(text, self.asked) + [self.end]

    def written(self, ids):
        """The text of an answer's ids, without what the template puts there and control tokens."""
        text = self.tokenizer.decode([i for i in ids if i not in self.marks],
                                     clean_up_tokenization_spaces=False)
        return text.removeprefix(self.lead).removesuffix(self.tail)


def printable(text):
    """Text with a question mark for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()
