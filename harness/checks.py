"""What a program can tell of an answer: regular expressions, and IFEval's verifiers by name.

A check is a regular expression, which is searched for, or a record such as {"id": "number_words",
"relation": "at least", "num_words": 50}: the 25 kinds of instructions of IFEval (Zhou et al. 2023,
arXiv 2311.07911) with their arguments, as its official program decides them. Five kinds need a
package when they are used: langdetect for the language, nltk for sentences and capital words.
"""
import inspect
import json
import re
from collections import Counter

RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def meets(check, text):
    """Whether an answer meets a check. An empty answer meets no named verifier."""
    if isinstance(check, str):
        return re.search(check, text) is not None
    arguments = {name: value for name, value in check.items() if name != "id"}
    return bool(text.strip()) and VERIFIERS[bare(check["id"])](text, **arguments)


def meets_loosely(check, text):
    """IFEval's loose reading: some form of the answer meets the check.

    The forms are the answer without its first line, its last, or both, each with and without its
    stars.
    """
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    forms += [form.replace("*", "") for form in forms]
    return any(form.strip() and meets(check, form) for form in forms)


def check_check(check):
    """Raise ValueError unless this is a check."""
    if isinstance(check, dict):
        if bare(check.get("id")) not in VERIFIERS:
            raise ValueError(f"{check!r} in \"checks\" has no verifier for its \"id\"; there are "
                             f"{', '.join(VERIFIERS)}")
        given = {name: value for name, value in check.items() if name != "id"}
        wanted = [name for name in inspect.signature(VERIFIERS[bare(check["id"])]).parameters
                  if name != "text"]
        if sorted(given) != sorted(wanted) or not all(map(fits, given, given.values())):
            raise ValueError(f"{check!r} in \"checks\" needs {', '.join(wanted) or 'no more'}")
        return
    try:
        re.compile(check)
    except (re.error, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{check!r} in \"checks\" is no regular expression") from None


def fits(name, value):
    """Whether an argument has the type that its name says."""
    if name.endswith("relation"):
        return value in RELATIONS
    if name.startswith(("num_", "nth_")) or name.endswith("frequency"):
        return type(value) is int
    if name in ("keywords", "forbidden_words"):
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    return isinstance(value, str) and value != ""


def bare(name):
    """The name of a verifier without its kind: "keywords:frequency" is "frequency"."""
    return name.rpartition(":")[2] if isinstance(name, str) else None


def compare(count, relation, number):
    return count < number if relation == "less than" else count >= number


# ---- how long

def number_words(text, relation, num_words):
    return compare(len(re.findall(r"\w+", text)), relation, num_words)


def number_sentences(text, relation, num_sentences):
    sentences = package("nltk").sent_tokenize(text)
    return compare(len(sentences), relation, num_sentences)


def number_paragraphs(text, num_paragraphs):
    """Paragraphs between lines of three stars; only the first and the last may be empty."""
    return len(filled(re.split(r"\s?\*\*\*\s?", text))) == num_paragraphs


def nth_paragraph_first_word(text, num_paragraphs, nth_paragraph, first_word):
    """Paragraphs between blank lines: how many, and what the n-th begins with."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != num_paragraphs or not 1 <= nth_paragraph <= count:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    word = re.match(r"""[^.,?!'"]*""", words[0].lstrip("'").lstrip('"'))[0]
    return word.lower() == first_word.lower()


def filled(parts):
    """Parts that are not empty; none at all if one in the middle is empty."""
    if not all(part.strip() for part in parts[1:-1]):
        return []
    return [part for part in parts if part.strip()]


# ---- words and letters

def existence(text, keywords):
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def forbidden_words(text, forbidden_words):
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def frequency(text, keyword, frequency, relation):
    return compare(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def letter_frequency(text, letter, let_frequency, let_relation):
    return compare(Counter(text.lower())[letter.lower()], let_relation, let_frequency)


def capital_word_frequency(text, capital_frequency, capital_relation):
    words = package("nltk").word_tokenize(text)
    return compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def no_comma(text):
    return "," not in text


# ---- language and case

def response_language(text, language):
    """What cannot be told counts as right."""
    detector = package("langdetect")
    detector.DetectorFactory.seed = 0
    try:
        return detector.detect(text) == language
    except detector.LangDetectException:
        return True


def english_lowercase(text):
    return text.islower() and response_language(text, "en")


def english_capital(text):
    return text.isupper() and response_language(text, "en")


# ---- form

def number_bullet_lists(text, num_bullets):
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(text, num_highlights):
    """*Highlighted* and **highlighted**; what is in two stars counts in both lists."""
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in single + double) >= num_highlights


def multiple_sections(text, section_spliter, num_sections):
    parts = re.split(rf"\s?{section_spliter}\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


def number_placeholders(text, num_placeholders):
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def title(text):
    titles = re.findall(r"<<[^\n]+>>", text)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def json_format(text):
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def constrained_response(text):
    return any(option in text for option in OPTIONS)


def postscript(text, postscript_marker):
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


# ---- beginning and end, and what is said twice

def quotation(text):
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def end_checker(text, end_phrase):
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def repeat_prompt(text, prompt_to_repeat):
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(text):
    answers = [answer.strip() for answer in filled(text.split("******"))]
    return len(answers) == 2 and answers[0] != answers[1]


VERIFIERS = {function.__name__: function for function in (
    number_words, number_sentences, number_paragraphs, nth_paragraph_first_word, existence,
    forbidden_words, frequency, letter_frequency, capital_word_frequency, no_comma,
    response_language, english_lowercase, english_capital, number_bullet_lists,
    number_highlighted_sections, multiple_sections, number_placeholders, title, json_format,
    constrained_response, postscript, quotation, end_checker, repeat_prompt, two_responses)}


def package(name):
    """A package that few checks need. Raises ValueError that says how to get it."""
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f"this check needs a package: pip install {name}") from None
