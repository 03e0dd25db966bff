"""Probabilities and texts of many records and edits at once equal those of one at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rome.data import rows as rows_of
from rome.data.answers import until_stop
from rome.data.records import Record
from rome.models import EditableModel
from rome.scoring import generation, greedy
from rome.scoring.generation import UNEDITED, Start
from rome.scoring.greedy import Question
from rome.scoring.probabilities import Extras, Query, score, score_records
from rome.scoring.settings import GenerationSettings
from tests.support import oracle, tiny
from tests.support.computations import MAIN, random_edits
from tests.support.oracle import changed
from tests.support.tiny import close

pytestmark = pytest.mark.usefixtures("one_thread")

# Targets of one and several tokens, one the beginning of another, after prompts that repeat, that
# end in a space, and that another prompt with its target is the beginning of.
PROMPTS = ["The capital of France is", "Where is São Tomé? In ", "東京タワー is in", "Rome is"]
PROMPTS += ["The capital of France is Paris, France, and", PROMPTS[0]]
TARGETS = ["Paris", "Paris, France", "Rome", "Ωmega"]
QUERIES = [Query(e, p, t) for e in range(4) for p in PROMPTS for t in TARGETS]
# Rows that are longer than a text may be, and rows of one key but other edits.
ROWS = [
    ("Rome", 0),
    ("In which country is the Tokyo Tower? It is in Japan, not in Italy: 東京.", 1),
]
ROWS += [("The mother tongue of Žižek is", 2), ("東京", 3), ("東京", 0), ("Where is Rome?", 1)]
GENERATION = GenerationSettings(top_k=3, max_tokens=18, seed=5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", [*MAIN, "mistral", "qwen2"])  # Two with windows.
def test_probabilities_equal_those_of_one_target_at_a_time(
    family: str, kind: str, dtype: str, tolerance: float
) -> None:
    model = tiny.model(family, dtype, kind)
    edits = random_edits(model)
    expected = []
    for e, edit in enumerate(edits):
        with changed(model, edit):
            expected += [oracle.nll(model, q.prompt, q.target) for q in QUERIES if q.edit == e]
    assert len(set(expected)) == 4 * 5 * 4  # One prompt comes twice; all else differs.
    order = random.Random(0).sample(range(len(QUERIES)), len(QUERIES))
    for budget in (1, 100, 10_000):
        scores = score(model, [QUERIES[i] for i in order], edits, budget)
        assert [one.nll for one in scores] == pytest.approx(
            [expected[i] for i in order], rel=tolerance
        )


def test_probabilities_need_a_token_before_the_target() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(ValueError, match="a token before it"):
        score(model, [Query(0, "", "Paris")], random_edits(model), 100)
    assert score(model, [], [], 100) == []


def test_equal_beginnings_are_run_once() -> None:
    model = tiny.model("llama")
    queries = [Query(0, PROMPTS[0], target) for target in ("Paris, France", "Rome", "Rome, Italy")]
    run: list[int] = []
    embedding = model.hf.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: run.append(args[0].numel()))
    score(model, queries, random_edits(model), 1000)
    texts = model.encode_targets([(one.prompt, one.target, " ") for one in queries])
    assert run == [len({tuple(text.ids[:n]) for text in texts for n in range(1, len(text.ids))})]


def test_records_keep_the_order_of_their_prompts() -> None:
    model = tiny.model("gpt2")
    edits = random_edits(model)[2:]
    names = ("Rome", "Paris", "Japan")
    records = [
        Record(
            i,
            ("P17", "P1")[i],
            "{} is in",
            name,
            *("Italy", "France", None, None),
            paraphrase_prompts=(f"Where is {name}? In", "It is in"),
            neighborhood_prompts=tuple(f"{other} is in" for other in names[: i + 1]),
            attribute_prompts=(),
            generation_prompts=(),
        )
        for i, name in enumerate(names[:2])
    ]
    columns = score_records(model, records, edits, 200, Extras(True, {"P17": "{} has"}))
    for record, edit, column in zip(records, edits, columns, strict=True):
        edited = f"{record.subject} is in Italy."
        with changed(model, edit):
            for kind, texts in (
                ("rewrite", [f"{record.subject} is in"]),
                ("paraphrase", record.paraphrase_prompts),
                ("neighborhood", record.neighborhood_prompts),
                ("attribute", []),
                ("neighborhood_plus", [f"{edited} {p}" for p in record.neighborhood_prompts]),
            ):
                for target, text in (("new", "Italy"), ("true", "France")):
                    expected = [oracle.nll(model, prompt, text) for prompt in texts]
                    assert column[f"{kind}_nll_{target}"] == pytest.approx(expected, rel=1e-6)
            for target, text in (("new", "Italy"), ("true", "France")):
                expected = [oracle.nll(model, f"{text} has", record.subject)]
                found = column.get(f"reversed_nll_{target}")
                assert found == (pytest.approx(expected) if record.relation_id == "P17" else None)


def starts(model: EditableModel) -> list[Start]:
    return [
        start
        for i, (text, edit) in enumerate(ROWS)
        for start in generation.starts(model, [text], edit, case_id=i)
    ]


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", MAIN)
def test_texts_equal_those_of_one_token_at_a_time(family: str, kind: str) -> None:
    model = tiny.model(family, "float64", kind)
    edits, rows = random_edits(model), starts(model)
    assert any(len(row.ids) > GENERATION.max_tokens for row in rows)
    expected = []
    for row in rows:
        with changed(model, edits[row.edit]):
            draws = generation._draws(GENERATION, row.key).tolist()
            expected.append(oracle.generate(model, row.ids, draws, 3, GENERATION.max_tokens))
    for ids, row in zip(expected, rows, strict=True):
        assert len(ids) == max(GENERATION.max_tokens, len(row.ids))
    for order in (range(6), (3, 5, 1, 0, 4, 2)):
        for budget in (1, 3 * GENERATION.max_tokens, 1000):
            found = generation.generate(model, [rows[i] for i in order], edits, GENERATION, budget)
            assert found == [expected[i] for i in order]


def test_draws_differ_by_seed_record_and_prompt() -> None:
    model = tiny.model("gpt2")
    prompts = generation.starts(model, ["Rome", "Rome"], 0, case_id=1)
    prompts += generation.starts(model, ["Rome"], 0, case_id=2)
    texts = [
        tuple(ids)
        for seed in (0, 1)
        for ids in generation.generate(
            model, prompts, random_edits(model), GenerationSettings(max_tokens=40, seed=seed), 1000
        )
    ]
    assert len(set(texts)) == 6


def test_sampling_takes_the_largest_in_proportion() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])
    draws = torch.arange(0, 1, 0.001, dtype=torch.float64)
    logits = probabilities.log().expand(len(draws), -1)
    ids = generation._sample(logits, 3, draws[:, None])[:, 0]
    shares = ids.bincount(minlength=5) / len(ids)
    assert close(shares, torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, 0.01)


def test_a_long_prompt_does_not_run_past_the_models_positions() -> None:
    """A text that is complete waits for shorter ones in its batch, and must not grow meanwhile."""
    model = tiny.model("gpt2")
    rows = [Start([5] * 120, 0, (0,)), Start([5], 0, (1,))]
    settings = GenerationSettings(max_tokens=30)
    long, short = generation.generate(model, rows, random_edits(model), settings, 10_000)
    assert (len(long), len(short)) == (120, 30)


def test_context_texts_are_the_same_every_time() -> None:
    model = tiny.model("gpt2")
    texts = generation.sample_context_texts(model, [(5, 3), (10, 2)], seed=0)
    assert len(texts) == 5
    assert texts == generation.sample_context_texts(model, [(5, 3), (10, 2)], seed=0)
    assert texts != generation.sample_context_texts(model, [(5, 3), (10, 2)], seed=1)
    assert not any(tiny.END in text for text in texts)


def said_plainly(model: EditableModel, prompt: str, target: str) -> list[int]:
    """The likeliest token, again and again, one forward pass of the whole text for each."""
    ids, target_ids = oracle.prompt_and_target(model.tokenizer, prompt, target)
    said: list[int] = []
    for _ in range(len(target_ids) + greedy.MORE_TOKENS):
        said.append(int(oracle.log_probabilities(model, ids + said)[-1].argmax()))
    return said


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", MAIN)
def test_greedy_texts_equal_those_of_one_token_at_a_time(family: str, kind: str) -> None:
    model = tiny.model(family, "float64", kind)
    edits = random_edits(model)
    questions = [Question(e, p, (t,)) for e in range(4) for p in PROMPTS[:4] for t in TARGETS[1:]]
    expected = []
    for question in questions:
        with changed(model, edits[question.edit]):
            ids = said_plainly(model, question.prompt, *question.targets)
        text = str(model.tokenizer.decode(ids))
        for special in model.tokenizer.all_special_tokens:
            text = text.split(special)[0]
        expected.append(until_stop(text, *question.targets))
    assert len(set(expected)) > 20
    order = random.Random(0).sample(range(len(questions)), len(questions))
    for budget in (1, 100, 10_000):
        found = greedy.say(model, [questions[i] for i in order], edits, budget)
        assert found == [expected[i] for i in order]


@pytest.mark.parametrize(
    ("text", "target", "kept"),
    [
        (" English.", "English", "English."),
        (" English. He was", "English", "English."),
        ("\n English\nQ:", "English", "English"),
        (" English, and", "English", "English, and"),
        (" St. Louis. It", "St. Louis", "St. Louis."),
        (" St. Paul", "Paris", "St."),
        (" 3.5 million! So", "3.5 million", "3.5 million!"),
        ("  ", "Paris", ""),
    ],
)
def test_what_is_said_ends_at_a_natural_stop(text: str, target: str, kept: str) -> None:
    assert until_stop(text, target) == kept


def test_a_prompt_that_fills_the_positions_is_answered_within_them() -> None:
    model = tiny.model("gpt2")
    long = Question(0, "東京" * 20 + " is", ("Rome",))
    count = len(model.encode([long.prompt])[0].ids)
    questions = [long, Question(0, "Rome is", ("in Italy, which is in 1890 as in 2022",))]
    model.hf.config.max_position_embeddings = count + 2
    found = greedy.say(model, questions, random_edits(model), 10_000)
    assert found == [greedy.say(model, [one], random_edits(model), 1)[0] for one in questions]


def test_a_token_that_is_nan_spoils_its_own_texts_only() -> None:
    """No mask keeps NaN out of a row that texts share, or out of padding."""
    model = tiny.model("gpt2")
    france = "The capital of France is"
    pairs = [(france, "Rome"), (france, "Qom and"), ("It is in", "Rome")]
    queries = [Query(0, *pair) for pair in pairs]
    clean = score(model, queries, [UNEDITED], 400)
    ids = [model.encode_targets([(*pair, " ")])[0].ids[:-1] for pair in pairs]
    bad = {*ids[1]} - {*ids[0], *ids[2]}
    assert bad
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[[0, *bad]] = torch.nan  # 0 was padding.
    found = score(model, queries, [UNEDITED], 400)
    assert [math.isnan(one.nll) for one in found] == [False, True, False]
    for n in (0, 2):
        assert found[n].nll == pytest.approx(clean[n].nll, rel=1e-9)


def test_every_end_of_an_answer_ends_it() -> None:
    """Of the generation config, as a number or a list, and added tokens that are marked special."""
    model = tiny.model("gpt2")
    (rome,) = model.encode([" Rome"])
    marked = model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    assert marked == 1
    ends = [rome.ids[0], rome.ids[-1]]
    for said in (ends[0], ends):
        model.hf.generation_config.eos_token_id = said
        model.__dict__.pop("special_ids", None)
        assert set(ends[:1]) <= model.special_ids
        assert model.tokenizer.convert_tokens_to_ids("<|eot|>") in model.special_ids
    assert set(ends) <= model.special_ids
    ids = [*model.encode(["It is"])[0].ids, ends[0], len(model.tokenizer) - 1]
    assert generation.decode(model, [ids]) == ["It is"]


@pytest.mark.parametrize(
    ("text", "target", "kept"),
    [
        ("北城。它在", "北城", "北城。"),
        ("東京！と", "京都", "東京！"),
        ("\u0939\u093e।\u0928", "x", "\u0939\u093e।"),
        ("Hue\u0302\u0301. It", "Hu\u1ebf", "Hu\u1ebf."),
        ("Saint-E\u0301tienne. It", "Saint-\u00c9tienne", "Saint-\u00c9tienne."),
    ],
)
def test_sentences_of_other_scripts_end_too(text: str, target: str, kept: str) -> None:
    assert until_stop(text, target) == kept


def test_an_extra_prompt_that_is_too_long_empties_its_column_only() -> None:
    model = tiny.model("gpt2")
    names = ("paraphrase", "neighborhood", "attribute", "generation")
    row = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "{} is in" + " the old town of Rome" * 6,
            "subject": "Rome",
            "target_new": {"str": "Italy", "id": None},
            "target_true": {"str": "Japan", "id": None},
        },
        **{f"{name}_prompts": ["Tokyo is in" + " the new town of Rome" * 6] for name in names},
    }
    record = rows_of.from_counterfact(row)
    found, other = (
        score_records(model, [record], [UNEDITED], 400, Extras(neighborhood_plus=plus))[0]
        for plus in (True, False)
    )
    why = found.pop("omitted")
    assert why.startswith("neighborhood_plus: a text must fit into gpt2's 128 positions, got ")
    assert found == other
