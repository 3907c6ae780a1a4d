"""Zero-shot tasks over local files, held against log likelihoods summed by hand."""

import bz2
import functools
import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlm.cli.evaluate import _print_results
from seedlm.compare import compare_runs, load_runs
from seedlm.errors import EvaluationError, SourceError
from seedlm.evaluation import zeroshot
from seedlm.evaluation.records import read_records
from seedlm.evaluation.run import Settings, evaluate
from seedlm.evaluation.text import Text
from seedlm.evaluation.zeroshot import TASKS, check_tasks, read_local, score_answers, zero_shot
from tiny_models import STORIES

ENDINGS = ["a red ball.", "her mom and dad were very happy.", "the big dog", "ran and ran in the park."]
ARC = [("Who plays?", ENDINGS, 0), ("What is big?", ENDINGS[::-1], 1), ("Where?", ENDINGS[1:], 2), ("Why?", ENDINGS[:3], 1)]
BOOLQ = [("Lily has a ball.", "does lily have a ball", 1), ("Tom is sad.", "is tom happy", 0)]
WINOGRANDE = [("Tom and Ann ran because Tom", "Tom and Ann ran because Ann", "was happy.", n) for n in (0, 1)]
HELLASWAG = [("Playing: A girl sees a ball. She", ENDINGS, 3), ("Running: A dog is big. It", ENDINGS[::-1], 3)]


@pytest.fixture
def data(tmp_path):
    arc = [{"query": f"Question: {q}", "choices": choices, "gold": gold} for q, choices, gold in ARC]
    boolq = [{"query": f"Passage: {p}\nQuestion: {q}?", "choices": ["no", "yes"], "gold": gold} for p, q, gold in BOOLQ]
    winogrande = [{"context_options": [a, b], "continuation": c, "gold": gold} for a, b, c, gold in WINOGRANDE]
    for name, rows in [
        ("arc/arc_easy", arc),
        ("arc/arc_challenge", arc[:2]),
        ("boolq/boolq", boolq),
        ("winogrande/winogrande", winogrande),
    ]:
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for context, endings, gold in HELLASWAG for line in (context, str(gold), *endings)]
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(lines).encode() + b"\n"))
    return tmp_path


def expected():
    """(acc, acc_norm) of each task, from prompts written out and float64 logits."""
    model = AutoModelForCausalLM.from_pretrained(STORIES).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)

    def likelihood(context, answer):
        given, ids = (tokenizer(text)["input_ids"] for text in (context, context + answer))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[place - 1, ids[place]]) for place in range(len(given), len(ids)))

    def accuracy(questions):
        right, right_norm = [], []
        for contexts, answers, gold in questions:
            scores = [likelihood(context, f" {answer}") for context, answer in zip(contexts, answers, strict=True)]
            right.append(int(np.argmax(scores)) == gold)
            right_norm.append(int(np.argmax([s / len(a) for s, a in zip(scores, answers, strict=True)])) == gold)
        return np.mean(right), np.mean(right_norm)

    arc = [([f"Question: {q}\nAnswer:"] * len(choices), choices, gold) for q, choices, gold in ARC]
    boolq = [([f"{p}\nQuestion: {q}?\nAnswer:"] * 2, ["no", "yes"], gold) for p, q, gold in BOOLQ]
    return {
        "arc_easy": accuracy(arc),
        "arc_challenge": accuracy(arc[:2]),
        "hellaswag": accuracy([([context] * 4, endings, gold) for context, endings, gold in HELLASWAG]),
        "winogrande": (accuracy([([a, b], [c, c], gold) for a, b, c, gold in WINOGRANDE])[0], None),
        "boolq": (accuracy(boolq)[0], None),
    }


def test_all_tasks_are_answered_as_by_hand(data, tmp_path, capfd):
    pytest.importorskip("lm_eval")
    (tmp_path / "text").write_text("Once upon a time there was a ball. " * 5)
    settings = Settings(context=16, device="cpu", tasks=TASKS, task_data=str(data))
    results = evaluate(str(STORIES), Text.from_file(tmp_path / "text"), settings, out=tmp_path / "run.json")
    assert results["environment"]["lm_eval"]
    questions = read_records(results, tmp_path / "run.json")["tasks"]
    for task, result in results["tasks"].items():
        right = [question["right"] == question["chosen"] for question in questions[task]]
        assert np.mean(right) == result["acc_norm" if "acc_norm" in result else "acc"]["mean"]
    assert [question["right"] for question in questions["arc_easy"]] == [gold for _, _, gold in ARC]
    assert [question["right"] for question in questions["winogrande"]] == [0, 1]
    assert questions["arc_easy"][2]["question"] == "Question: Where?\nAnswer:"
    assert questions["arc_easy"][2]["choices"] == ENDINGS[1:]
    assert questions["winogrande"][0]["question"] == "... was happy."
    assert questions["winogrande"][0]["choices"] == ["Tom and Ann ran because Tom", "Tom and Ann ran because Ann"]
    assert "loglikelihood" not in capfd.readouterr().err
    tasks = results["tasks"]
    assert {name: (task["acc"]["mean"], task.get("acc_norm", {}).get("mean")) for name, task in tasks.items()} == expected()
    assert [tasks[name]["questions"] for name in TASKS] == [4, 2, 2, 2, 2]
    assert tasks["boolq"]["version"] >= 2
    right = tasks["arc_easy"]["acc"]["mean"] * 4
    assert tasks["arc_easy"]["acc"]["standard_error"] == pytest.approx((right / 4 * (1 - right / 4) / 3) ** 0.5)


class Plain(torch.nn.Module):
    """A model that gives the logits of all its inputs, and knows of no way to give fewer."""

    def __init__(self, model):
        super().__init__()
        self.model, self.device = model, model.device
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids, use_cache):
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["last-logits", "all-logits"])
def test_answers_are_scored_as_if_alone(wrap):
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, (400,), generator=draw).tolist()
    pairs = [(ids[n : n + 1 + 5 * n], ids[n + 7 : n + 8 + n % 4]) for n in range(12)]
    pairs += [(ids[:9], [token]) for token in range(20, 24)]  # inputs that are the same
    with torch.no_grad():
        likely = int(model(torch.tensor([ids[:9]])).logits[0, -1].argmax())
    pairs.append((ids[:9], [likely]))
    found = score_answers(wrap(model), pairs, batch_size=3, longest=24)
    for (context, answer), (score, greedy) in zip(pairs, found, strict=True):
        given = (context + answer)[-25:]
        with torch.no_grad():
            logits = model(torch.tensor([given[:-1]])).logits[0, -len(answer) :].double().log_softmax(-1)
        assert score == pytest.approx(sum(float(row[token]) for row, token in zip(logits, answer, strict=True)), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == answer)
    assert found[-1][1]
    with pytest.raises(SourceError, match="questions: its token 3 has the id 512, and the model knows the ids 0 to 511"):
        score_answers(wrap(model), [([1, 2], [512])], batch_size=3, longest=24)


def test_a_stopped_run_goes_on_after_the_last_whole_task(data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    (tmp_path / "text").write_text("Once upon a time there was a ball. " * 5)
    text, out = Text.from_file(tmp_path / "text"), tmp_path / "run.json"
    settings = Settings(context=16, batch_size=2, limit=3, device="cpu", tasks=TASKS, task_data=str(data))
    whole = evaluate(str(STORIES), text, settings)
    asked = []

    def ask(model, tokenizer, tasks, **how):
        for answer in zero_shot(model, tokenizer, tasks, **how):
            asked.append(answer[0])
            yield answer
            if asked == list(TASKS[:3]):
                raise KeyboardInterrupt

    monkeypatch.setattr("seedlm.evaluation.run.zero_shot", ask)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(STORIES), text, settings, out=out)
    journal = tmp_path / "run.json.partial"
    journal.write_bytes(journal.read_bytes()[:-9])  # the third task's line, torn
    results = evaluate(str(STORIES), text, settings, out=out)
    assert asked == [*TASKS[:3], *TASKS[2:]]
    assert (results["tasks"], results["metrics"]) == (whole["tasks"], whole["metrics"])
    assert results["run"]["resumed_windows"] == 3
    assert set(read_records(results, out)["tasks"]) == set(TASKS)
    assert not journal.exists()


def test_unknown_tasks_are_refused(data):
    pytest.importorskip("lm_eval")
    with pytest.raises(EvaluationError, match="unknown task 'piqa': local files are read for arc_easy, arc_challenge"):
        zero_shot(None, None, ["piqa"], data=data)
    with pytest.raises(EvaluationError, match="unknown task 'nonsense': `lm_eval ls tasks`"):
        zero_shot(None, None, ["arc_easy", "nonsense"])


GENERATION = {
    "task": "own_words",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
ROLLING = {
    **{key: GENERATION[key] for key in ("dataset_path", "test_split", "metadata")},
    "task": "own_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """Tasks of their own kinds, and a group and a tag of them, in place of the harness' 14 thousand."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    rows = [{"question": "Once upon a time, there was a", "answer": "x"}, {"question": "Lily had a red", "answer": "ball"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}}
    odd = {**GENERATION, **files, "task": "own_odd", "output_type": "something_else"}
    definitions = [{**GENERATION, **files, "tag": ["own_tag"]}, {**ROLLING, **files}, odd]
    definitions.append({"group": "own_group", "task": ["own_tag", "own_text", "own_words"]})
    definitions.append({"group": "own_changed", "task": [{"task": "own_words", "num_fewshot": 3}]})
    (tmp_path / "definitions").mkdir()
    for number, definition in enumerate(definitions):
        (tmp_path / "definitions" / f"{number}.yaml").write_text(json.dumps(definition))
    manager = functools.partial(lm_eval.TaskManager, include_path=str(tmp_path / "definitions"), include_defaults=False)
    monkeypatch.setattr(lm_eval, "TaskManager", manager)
    zeroshot._manager.cache_clear()
    yield
    zeroshot._manager.cache_clear()


def test_tasks_that_generate_or_score_texts_are_run_and_groups_are_opened(own_tasks):
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    found = {task: (result, rows) for task, result, rows in zero_shot(model, tokenizer, ["own_group"])}
    assert list(found) == ["own_words", "own_text"]
    words, text = found["own_words"][0], found["own_text"][0]
    assert words["questions"] == text["questions"] == 2
    assert words["metrics"]["exact_match"]["mean"] == 0.5  # after "Lily had a red" it does say "ball"
    assert text["metrics"]["word_perplexity"]["mean"] > 1.0
    assert not any(rows for _, rows in found.values())


def test_what_a_task_asks_for_is_known_before_anything_runs(own_tasks):
    assert check_tasks(["own_words", "own_group"], None) == ("own_words", "own_text")
    with pytest.raises(EvaluationError, match="task 'own_odd' asks for 'something_else'; tasks that are run here ask for"):
        check_tasks(["own_words", "own_odd"], None)
    with pytest.raises(EvaluationError, match="the group 'own_changed' changes the tasks in it"):
        check_tasks(["own_changed"], None)


def test_results_of_such_tasks_are_printed_and_compared_without_them(own_tasks, tmp_path, capsys):
    (tmp_path / "text").write_text("Once upon a time there was a ball. " * 5)
    out = tmp_path / "run.json"
    settings = Settings(context=16, limit=2, device="cpu", tasks=("own_group",))
    results = evaluate(str(STORIES), Text.from_file(tmp_path / "text"), settings, out=out)
    assert results["settings"]["tasks"] == ["own_words", "own_text"]
    _print_results(results)
    assert "own_words         0.5000 +- 0.5000 (exact_match, 2 questions, version 1.0)" in capsys.readouterr().out
    second = tmp_path / "second.json"
    second.write_text(json.dumps({**results, "records": None}))
    assert compare_runs(load_runs([out, second]))["tasks"] == []


def test_the_harness_own_groups_are_opened():
    pytest.importorskip("lm_eval")
    assert set(check_tasks(["ai2_arc"], None)) == {"arc_easy", "arc_challenge"}
    mmlu = check_tasks(["mmlu", "gsm8k"], None)
    assert len(mmlu) == 58
    assert all(task.startswith("mmlu_") for task in mmlu[:-1])


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"need lm-evaluation-harness: pip install '\.\[eval\]' in a copy"):
        zero_shot(None, None)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("arc_easy", b'{"query": "x"}', "is not as arc_easy needs it \\(KeyError: 'choices'\\)"),
        ("boolq", b"{", "is not as boolq needs it \\(JSONDecodeError"),
        ("winogrande", b"", "holds no questions"),
        ("arc_challenge", b"\xff", "is not UTF-8 text"),
        ("hellaswag", bz2.compress(b"one\n0\n"), "2 lines are not six a question"),
        ("hellaswag", b"no bzip2", "cannot be read"),
    ],
    ids=["field", "json", "empty", "bytes", "lines", "archive"],
)
def test_wrong_files_are_refused(data, task, content, message):
    path = next(data.rglob(f"{task.replace('hellaswag', 'hellaswag_val_full')}.*"))
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_local(task, data)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read \\(No such file"):
        read_local("boolq", tmp_path)
