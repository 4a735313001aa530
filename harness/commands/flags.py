"""The command lines of eval.py and of sampling.py."""
import argparse

from harness.settings import Parser

ANSWER_TOKENS = ("--max-answer-tokens", "--max-new-tokens")  # the second is its old name


def positive(text):
    """An argument that is a whole number from 1 up."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def eval_parser():
    parser = Parser(description="Look at a run, or compare models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(name, help):
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name in ("show", "repeat", "export"):
            command.add_argument("run", help="the run's folder")
        return command

    report = add("report", "(re)draw the report of a run, or several runs in the same plots")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    report.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html; of "
                        "several runs, compare.html beside the first)")
    show = add("show", "one prompt's journey through an iteration, in the terminal")
    show.add_argument("prompt_id", nargs="?", metavar="PROMPT_ID", help="(default: one that a "
                      "pair of judgments came of)")
    show.add_argument("--iteration", type=int, metavar="T", help="(default: the one that asked "
                      "PROMPT_ID; else the last that trained the judge, or else the last)")
    compare = add("compare", "which of two models' answers a judge prefers, in both orders")
    compare.add_argument("a", metavar="A", help="a model (hub name, folder, runs/x/iter4), or "
                         "JSONL of \"prompt\" and \"text\", such as runs/x/iter4/eval.jsonl")
    compare.add_argument("b", metavar="B", help="what to compare it with")
    compare.add_argument("--judge", required=True,
                         help="a model that took no part in making A or B")
    compare.add_argument("--prompts", help="JSONL with \"prompt\", or one prompt a line (default: "
                         "those of A's or B's file, else of their run, else data/eval.jsonl)")
    compare.add_argument("--out", help="a JSONL file for every pair with its verdicts")
    compare.add_argument("--max-verdict-tokens", type=positive, default=512,
                         help="longest verdict, in tokens; verdicts are greedy (default: "
                         "%(default)s)")
    repeat = add("repeat", "make a run's comparisons again: do winner and pair stay?")
    repeat.add_argument("--answers", type=positive, default=20,
                        help="of how many answers an iteration (default: %(default)s)")
    export = add("export", "answers of a run's iterations in the files that official tools read, "
                 "or one plain model folder of base and adapter")
    export.add_argument("--format", required=True,
                        choices=["alpaca", "arena-hard", "mt-bench", "ifeval", "model"],
                        help="whose files, or model")
    export.add_argument("--questions", help="the tool's official question file")
    export.add_argument("--out", help="a folder (default: RUN/export/FORMAT)")
    ifeval = add("ifeval", "IFEval's four shares: how often models do what they are asked, told by "
                 "rules, not by a judge")
    ifeval.add_argument("models", metavar="RUN_OR_MODEL", nargs="+",
                        help="a run's folder (all its iterations), or a model (hub name, folder, "
                        "runs/x/iter4); answers are greedy")
    ifeval.add_argument("--questions", required=True, help="IFEval's input_data.jsonl")
    ifeval.add_argument("--limit", type=positive, metavar="N",
                        help="ask the first N questions only")
    ifeval.add_argument("--out", metavar="FOLDER", help="keep the answers there, as JSONL of "
                        "\"prompt\" and \"response\", and reuse those that are there")
    judge = add("judge", "how often a judge prefers the right one of labelled pairs")
    judge.add_argument("models", metavar="RUN_OR_MODEL", nargs="+",
                       help="a run's folder (all its iterations), or a model")
    judge.add_argument("--pairs", required=True, help="JSON lines or a list, as RewardBench "
                       "(prompt, chosen, rejected, subset) or JudgeBench (question, response_A, "
                       "response_B, label)")
    judge.add_argument("--judgments", type=positive, default=5,
                       help="scores for each answer (default: %(default)s)")
    judge.add_argument("--limit", type=positive, metavar="N",
                       help="N pairs only, drawn at random (--seed)")
    for command, last in ((repeat, ""), (export, "; of --format model the last")):
        command.add_argument("--iterations", type=int, nargs="+",
                             help=f"which (default: all{last})")
    half = ", or half of a smaller context"
    for command, default in (
            (compare, "a run's own, else 1024"),
            (export, f"the benchmark's: 2048, 4096, 1024, 1280, in --format's order{half}"),
            (ifeval, f"1280, as lm-evaluation-harness has it{half}")):
        command.add_argument(*ANSWER_TOKENS, type=positive, metavar="N", dest="max_new_tokens",
                             help=f"longest answer, in tokens (default: {default})")
    for command in (compare, export):
        command.add_argument("--temperature", type=float, default=0.8,
                             help="of the answers; 0 is greedy (default: %(default)s)")
        command.add_argument("--top-p", type=float, default=0.95,
                             help="of the answers: the nucleus (default: %(default)s)")
    for command in (compare, repeat, export, ifeval, judge):
        command.add_argument("--bits", type=int, choices=[4, 16, 32], help="of the models "
                             "(default: a run's own, else 4 on CUDA, 32 elsewhere)")
    for command in (compare, repeat, export, judge):
        command.add_argument("--seed", type=int, default=0,
                             help="of the draws (default: %(default)s)")
    return parser


def conversation_arguments():
    """What `python sampling.py` is asked for; a mistake ends the program."""
    parser = argparse.ArgumentParser(description="Ask a model one question, or talk to it.")
    add = parser.add_argument
    add("model", help="a hub name, a model folder, or an iteration of a run (runs/x/iter4)")
    add("question", nargs="?", help="without one: a conversation, which an empty line ends")
    add("--n", type=int, default=1, help="answers to the question (default: %(default)s)")
    add(*ANSWER_TOKENS, type=int, default=512, metavar="N", dest="max_new_tokens",
        help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="mass of the nucleus (default: %(default)s)")
    add("--bits", type=int, choices=[4, 16, 32], help="default: its run's; 4 on CUDA, else 32")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    if (min(args.n, args.max_new_tokens) < 1 or args.temperature < 0 or not 0 < args.top_p <= 1
            or args.n > 1 and args.question is None):
        parser.error("--n (1 in a conversation) and --max-answer-tokens must be at least 1, "
                     "--temperature at least 0, --top-p above 0 and at most 1")
    return args
