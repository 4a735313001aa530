"""harness/checks.py: every verifier on texts that just meet it and texts that just miss it.

The expectations follow IFEval's definitions. Where the package if-verifiable is installed, which
carries the official program, thousands of made texts are held to it as well.
"""
import random

import pytest

from harness.checks import VERIFIERS, check_check, meets, meets_loosely

CASES = {  # verifier: its arguments, texts that meet it, texts that do not
    "number_words": ({"relation": "at least", "num_words": 3},
                     ["one two three", "one-two three", "a b c d"], ["one two", "", "..."]),
    "number_paragraphs": ({"num_paragraphs": 2},
                          ["a\n***\nb", "***\na\n***\nb\n***", "a *** b"],
                          ["a", "a\n***\n***\nb", "a\n***\nb\n***\nc"]),
    "nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Rain"},
        ["a\n\nrain falls", "a\n\n\"Rain, they say", "a\n\nRAIN!"],
        ["a\n\nthe rain", "rain\n\na", "a\n\nrain\n\nb", "a\n\n\n\nrain"]),
    "existence": ({"keywords": ["oak", "elm"]}, ["Oak and elm", "ELMS, oaks"], ["oak", "el m oak"]),
    "forbidden_words": ({"forbidden_words": ["oak", "elm"]}, ["oaken elms"], ["An OAK.", "elm"]),
    "frequency": ({"keyword": "oak", "frequency": 2, "relation": "at least"},
                  ["oak Oak", "oakoak"], ["oak", "o ak oak"]),
    "letter_frequency": ({"letter": "q", "let_frequency": 2, "let_relation": "less than"},
                         ["a quiet sea", "abc"], ["Quick queen"]),
    "no_comma": ({}, ["a; b", "one"], ["a, b"]),
    "number_bullet_lists": ({"num_bullets": 2}, ["* a\n* b", "- a\n  - b", "text\n* a\n- b"],
                            ["* a", "* a\n* b\n* c", "** a\n* b"]),
    "number_highlighted_sections": ({"num_highlights": 2}, ["*a* *b*", "**a** x *b*"],
                                    ["*a*", "* * *b", "*a\nb* *c*"]),
    "multiple_sections": ({"section_spliter": "PART", "num_sections": 2},
                          ["PART 1\na\nPART 2\nb"], ["PART 1 a", "part 1 a part 2 b", "PART a"]),
    "number_placeholders": ({"num_placeholders": 2}, ["[a] and [b c]", "[][]"], ["[a]", "[a\nb] [c]"]),
    "title": ({}, ["<<A walk>>\ntext"], ["<<>>", "<< >>", "<A walk>", "<<A\nwalk>>"]),
    "json_format": ({}, ['{"a": 1}', '```json\n{"a": [1]}\n```', "[]"], ["{'a': 1}", "a: 1"]),
    "constrained_response": ({}, ["My answer is maybe."], ["my answer is yes.", "Yes."]),
    "postscript": ({"postscript_marker": "P.S."}, ["a\nP.S. b", "p. s. b"], ["a\nPS b", "P.S b"]),
    "quotation": ({}, ['"a"', ' "a b" \n'], ['"', '"a', "'a'"]),
    "end_checker": ({"end_phrase": "The end."}, ["So. the end.", 'x "The end."\n'], ["The end. x"]),
    "repeat_prompt": ({"prompt_to_repeat": "Say it."}, [" SAY IT. Yes"], ["Well. Say it."]),
    "two_responses": ({}, ["a\n******\nb", "******a******b"],
                      ["a******a", "a", "a******b******c", "a******  ******b"]),
    "response_language": ({"language": "de"},
                          ["Heute scheint die Sonne, und wir gehen im Wald spazieren.", "12"],
                          ["Today the sun is shining, and we take a walk in the wood."]),
    "english_lowercase": ({}, ["this is a plain english sentence about the weather today"],
                          ["This is a plain english sentence about the weather today",
                           "das ist ein einfacher satz über das wetter von heute"]),
    "english_capital": ({}, ["THIS IS A PLAIN ENGLISH SENTENCE ABOUT THE WEATHER TODAY"],
                        ["THIS IS A PLAIN ENGLISH SENTENCE ABOUT THE WEATHER tODAY"]),
}
NLTK = {"number_sentences", "capital_word_frequency"}  # their data cannot be fetched in tests


@pytest.mark.parametrize("name", CASES)
def test_a_verifier_tells_what_just_meets_it_from_what_just_misses_it(name):
    arguments, good, bad = CASES[name]
    check = {"id": name, **arguments}
    check_check(check)
    assert [text for text in good if not meets(check, text)] == []
    assert [text for text in bad if meets(check, text)] == []
    assert not meets(check, "") and not meets(check, " \n")


def test_every_verifier_is_tried():
    assert CASES.keys() | NLTK == VERIFIERS.keys() and len(VERIFIERS) == 25


@pytest.mark.parametrize("number, relation, expected", [
    (2, "at least", False), (3, "at least", True), (3, "less than", False), (2, "less than", True)])
def test_relations(number, relation, expected):
    check = {"id": "number_words", "relation": relation, "num_words": 3}
    assert meets(check, "word " * number) == expected


def test_a_kind_before_the_name_is_no_matter():
    assert meets({"id": "punctuation:no_comma"}, "a") and not meets({"id": "no_comma"}, "a,")


def test_a_regular_expression_is_searched_for():
    assert meets("b+", "abba") and not meets("^b", "abba") and meets("^$", "")


def test_loosely_the_first_and_the_last_line_and_stars_do_not_count():
    check = {"id": "quotation"}
    for text in ('Sure!\n"a"', '"a"\nBye.', 'Sure!\n"a"\nBye.', '**"a"**', 'Sure!\n*"a"*\nBye.'):
        assert not meets(check, text) and meets_loosely(check, text), text
    assert not meets_loosely(check, 'One\ntwo\n"a"')


@pytest.mark.parametrize("check, says", [
    ({"id": "no_such"}, "no verifier"), ({}, "no verifier"), ({"id": 3}, "no verifier"),
    ({"id": "number_words", "num_words": 3}, "needs relation, num_words"),
    ({"id": "number_words", "relation": "about", "num_words": 3}, "needs relation, num_words"),
    ({"id": "number_words", "relation": "at least", "num_words": "3"}, "needs relation"),
    ({"id": "no_comma", "num_words": 3}, "needs no more"),
    ({"id": "existence", "keywords": "oak"}, "needs keywords"),
    ("(", "no regular expression"), (3, "no regular expression")])
def test_what_is_no_check_is_refused(check, says):
    with pytest.raises(ValueError, match=says):
        check_check(check)


# ---- the official program

def texts_for(check, chance):
    """Made texts around the limit of a check, some of them changed a little."""
    _, good, bad = CASES[check["id"]]
    everything = [text for _, met, missed in CASES.values() for text in [*met, *missed]]
    texts = [*good, *bad, *chance.sample(everything, 20)]
    for text in list(texts):
        texts += [text.upper(), text.lower(), f"Sure!\n{text}", f"{text}\nBye.", f"*{text}*",
                  f'"{text}"', text * 2, text[:-1], text.replace("\n", "\n\n")]
    return [text for text in texts if text.strip()]


@pytest.mark.parametrize("name", CASES)
def test_the_official_program_says_the_same(name):
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    official_forms = pytest.importorskip("if_verifiable.common").get_loose_transformations
    names = {full.partition(":")[2]: full for full in registry.INSTRUCTION_DICT}
    check = {"id": name, **CASES[name][0]}
    official = registry.INSTRUCTION_DICT[names[name]](names[name])
    official.build_description(**CASES[name][0])
    for text in texts_for(check, random.Random(name)):
        assert meets(check, text) == bool(official.check_following(text)), text
        forms = [form for form in official_forms(text) if form.strip()]
        expected = any(official.check_following(form) for form in forms)
        assert meets_loosely(check, text) == expected, text
