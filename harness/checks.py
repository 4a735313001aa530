"""Checks: what can be said of an answer without anybody's opinion.

A check is a regular expression, or a named verifier such as {"id": "number_words",
"relation": "at least", "num_words": 50}: one of the 25 types of instruction of IFEval (Zhou et al.
2023, arXiv 2311.07911), as its official checkers define them. Where these differ from ours:

1. Keywords, section marks and markers of postscripts are texts; theirs are regular expressions,
   of which IFEval's own questions have none.
2. letter_frequency counts any character; theirs puts a random letter in the place of one that is
   not in a to z, as in two of IFEval's questions.
3. langdetect guesses with a fixed seed, so that the same answer has the same language every time.

Only what needs a language detector or a sentence splitter imports a package, when it is used.
"""
import inspect
import json
import re
import signal
import threading
from contextlib import contextmanager

PATIENCE = 5  # seconds that a regular expression may take on one answer

# What a verifier's arguments must be; the functions below name it as the argument's type.
NUMBER = "a whole number"
TEXT = "a text"
TEXTS = "a list of texts"
LETTER = "one character"
RELATION = '"less than" or "at least"'


class Missing(ValueError):
    """A package, or a package's data, is not installed."""


def truth(checks, text):
    """How many of the checks an answer meets: the truth about it."""
    return sum(meets(check, text) for check in checks)


def meets(check, text):
    """Whether an answer meets a check. An empty answer meets no named verifier."""
    if isinstance(check, str):
        with time_limit(check):
            return re.search(check, text) is not None
    verifier, arguments = verifier_of(check)
    return bool(text.strip()) and verifier(text, **arguments)


@contextmanager
def time_limit(check):
    """Raise ValueError if a regular expression takes longer than PATIENCE.

    Some take time that doubles with each character, and would hold up a run for good.
    """
    def give_up(*_):
        raise ValueError(f"the check {check!r} takes more than {PATIENCE} s on one answer: write "
                         "it so that no two repetitions can match the same text, and choose "
                         "another --out")

    if threading.current_thread() is not threading.main_thread():
        yield  # alarms come to the main thread only
        return
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def loose(check, text):
    """IFEval's milder reading: one of eight variants of the answer meets the check.

    They forgive a line of introduction, a last line, and asterisks of Markdown.
    """
    lines = text.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [text, *shorter]
    return any(meets(check, variant) or meets(check, variant.replace("*", ""))
               for variant in variants)


def check_check(check):
    """Raise ValueError if this is no check, and Missing if it is one that cannot be used here."""
    if isinstance(check, dict):
        meets(check, "A word.")
        return
    try:
        re.compile(check)
    except (re.error, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{check!r} is no regular expression") from None


def verifier_of(check):
    """(function, its arguments) of a named verifier. Raises ValueError if there is none such."""
    name = check.get("id") if isinstance(check, dict) else None
    full = {known.split(":")[1]: known for known in VERIFIERS}
    verifier = VERIFIERS.get(full.get(name, name)) if isinstance(name, str) else None
    if verifier is None:
        raise ValueError(f"{name!r} is no verifier; there are {', '.join(full)}")
    arguments = {key: value for key, value in check.items() if key != "id"}
    _, *parameters = inspect.signature(verifier).parameters.values()
    for parameter in parameters:
        if not is_a(parameter.annotation, arguments.get(parameter.name)):
            raise ValueError(f'{name} needs "{parameter.name}", {parameter.annotation}')
    unknown = sorted(arguments.keys() - {parameter.name for parameter in parameters})
    if unknown:
        raise ValueError(f'{name} has no "{unknown[0]}"')
    return verifier, arguments


def is_a(kind, value):
    """Whether a value is what an argument must be."""
    if kind == NUMBER:
        return type(value) is int and value >= 0  # which True is not
    if kind == RELATION:
        return value in ("less than", "at least")
    if kind == TEXTS:
        return isinstance(value, list) and bool(value) and all(is_a(TEXT, one) for one in value)
    return isinstance(value, str) and bool(value.strip()) and (kind == TEXT or len(value) == 1)


def holds(count, relation, number):
    return count < number if relation == "less than" else count >= number


# ---- keywords

def occurrences(word, text):
    """How often a word, or part of one, is found; case does not count."""
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def existence(text, keywords: TEXTS):
    return all(occurrences(word, text) for word in keywords)


def frequency(text, keyword: TEXT, frequency: NUMBER, relation: RELATION):
    return holds(occurrences(keyword.strip(), text), relation, frequency)


def forbidden_words(text, forbidden_words: TEXTS):
    """None of the words is there as a whole word; case does not count."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
                   for word in forbidden_words)


def letter_frequency(text, letter: LETTER, let_frequency: NUMBER, let_relation: RELATION):
    return holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# ---- language

def language_of(text):
    """The code of a text's language, such as "en", by langdetect; None where it finds none."""
    try:
        import langdetect
    except ImportError:
        raise Missing("the package langdetect is missing: pip install langdetect") from None
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def response_language(text, language: TEXT):
    """A text without a language, such as a number, is in any."""
    return language_of(text) in (language, None)


# ---- length_constraints

def with_nltk(function, text):
    """A list of the text's sentences (sent_tokenize) or words (word_tokenize), by nltk."""
    try:
        import nltk
        return getattr(nltk, function)(text)
    except ImportError:
        raise Missing("the package nltk is missing: pip install nltk") from None
    except LookupError:
        raise Missing("nltk's data punkt_tab is missing: "
                      "python -m nltk.downloader punkt_tab") from None


def parts_between(text, divider):
    """The parts of a text between dividers; a blank first or last one is left out."""
    parts = [part.strip() for part in text.split(divider)]
    if not parts[-1]:
        parts.pop()
    if parts and not parts[0]:
        parts.pop(0)
    return parts


def number_words(text, num_words: NUMBER, relation: RELATION):
    return holds(len(re.findall(r"\w+", text)), relation, num_words)


def number_sentences(text, num_sentences: NUMBER, relation: RELATION):
    return holds(len(with_nltk("sent_tokenize", text)), relation, num_sentences)


def number_paragraphs(text, num_paragraphs: NUMBER):
    """Exactly so many paragraphs between lines of ***, none of them blank."""
    parts = parts_between(text, "***")
    return len(parts) == num_paragraphs and all(parts)


def nth_paragraph_first_word(text, num_paragraphs: NUMBER, nth_paragraph: NUMBER,
                             first_word: TEXT):
    """Exactly so many paragraphs between blank lines, and the n-th begins with the word."""
    parts = [part.strip() for part in text.split("\n\n")]
    count = sum(bool(part) for part in parts)
    if count != num_paragraphs or not 1 <= nth_paragraph <= count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


# ---- detectable_content

def number_placeholders(text, num_placeholders: NUMBER):
    """At least so many [placeholders], each within a line."""
    count = sum("[" in part for line in text.split("\n") for part in line.split("]")[:-1])
    return count >= num_placeholders


def postscript(text, postscript_marker: TEXT):
    marker = postscript_marker.strip()
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(marker)
    return re.search(pattern or re.escape(marker.lower()), text.lower()) is not None


# ---- detectable_format

def number_bullet_lists(text, num_bullets: NUMBER):
    """Exactly so many lines that begin with * (but not **) or with -."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(text, num_highlights: NUMBER):
    """At least so many *passages* and **passages** that are not blank, each within a line."""
    found = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(passage.strip()) for passage in found) >= num_highlights


def multiple_sections(text, section_spliter: TEXT, num_sections: NUMBER):
    """At least so many section marks, such as "Section 1"."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def title(text):
    """A line has a <<title>> that is not blank."""
    within = [line.partition("<<")[2].rpartition(">>")[0] for line in text.split("\n")]
    return any(one.lstrip("<").rstrip(">").strip() for one in within)


def constrained_response(text):
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def json_format(text):
    """The whole text is JSON, perhaps in a fenced block."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


# ---- combination

def two_responses(text):
    """Two different answers with ****** between them."""
    parts = parts_between(text, "******")
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeat_prompt(text, prompt_to_repeat: TEXT):
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


# ---- startend

def quotation(text):
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def end_checker(text, end_phrase: TEXT):
    """The text ends with the phrase; case, and quotation marks around the text, do not count."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


# ---- change_case and punctuation

def capital_word_frequency(text, capital_frequency: NUMBER, capital_relation: RELATION):
    capitals = [word for word in with_nltk("word_tokenize", text) if word.isupper()]
    return holds(len(capitals), capital_relation, capital_frequency)


def english_capital(text):
    return response_language(text, "en") and text.isupper()


def english_lowercase(text):
    return response_language(text, "en") and text.islower()


def no_comma(text):
    return "," not in text


KINDS = {
    "keywords": [existence, frequency, forbidden_words, letter_frequency],
    "language": [response_language],
    "length_constraints": [number_words, number_sentences, number_paragraphs,
                           nth_paragraph_first_word],
    "detectable_content": [number_placeholders, postscript],
    "detectable_format": [number_bullet_lists, number_highlighted_sections, multiple_sections,
                          title, constrained_response, json_format],
    "combination": [two_responses, repeat_prompt],
    "startend": [quotation, end_checker],
    "change_case": [capital_word_frequency, english_capital, english_lowercase],
    "punctuation": [no_comma],
}
VERIFIERS = {f"{kind}:{verifier.__name__}": verifier
             for kind, verifiers in KINDS.items() for verifier in verifiers}
