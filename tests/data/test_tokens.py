import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from omegaconf import OmegaConf
from recorder import Recorder

from pdlightning.config import instantiate, to_plain, validate
from pdlightning.data import (
    ByteTokenizer,
    LocalFiles,
    PlainIds,
    Tokens,
    TrainedTokenizer,
    check_context,
    check_vocabulary,
)

END = 256
EMPTY = "empty.jsonl"
STORIES = [f"<{i}>" + "abcdefghij"[i % 10] * (5 + 7 * i % 23) for i in range(400)]


@pytest.fixture
def stories(write_json):
    return write_json(STORIES)


def tokens(path, *, tokenizer=None, corpus=None, **changes):
    files = {"format": "json", "column": "text", "train": [path], "eval_fraction": 0.3}
    arguments = {"n_ctx": 16, "batch_size": 8, "eval_batches": 2, "seed": 0, "labels": "none"}
    return Tokens(
        corpus=LocalFiles(**files | (corpus or {})), tokenizer=tokenizer or ByteTokenizer(), **arguments | changes
    )


def documents_of(rows):
    """Texts between two end tokens of consecutive rows."""
    text = np.asarray(rows).reshape(-1)
    ends = np.flatnonzero(text == END)
    return [bytes(text[a + 1 : b].tolist()).decode() for a, b in zip(ends, ends[1:], strict=False)]


def naive_rows(texts, width):
    """Every document's bytes and an end, concatenated and cut."""
    line = [i for text in texts for i in [*text.encode(), END]]
    return [line[start : start + width] for start in range(0, len(line) - width + 1, width)]


def all_rows(data, split):
    array = getattr(data.tokens, split)
    return array.rows(range(len(array) // data.width), data.width).tolist()


def texts_of(array):
    line = array.span(0, len(array))
    return [bytes(part[:-1].tolist()).decode() for part in np.split(line, np.flatnonzero(line == END) + 1)[:-1]]


def test_rows_are_the_documents_with_ends_between_them_concatenated_and_cut(stories):
    data = tokens(stories)
    train, held_out = texts_of(data.tokens.train), texts_of(data.tokens.eval)
    assert sorted(train + held_out) == sorted(STORIES)
    in_order = {text: place for place, text in enumerate(STORIES)}
    assert train == sorted(train, key=in_order.__getitem__)
    assert all_rows(data, "train") == naive_rows(train, 16)
    assert all_rows(data, "eval") == naive_rows(held_out, 16)


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(stories):
    data = tokens(stories, batch_size=10)
    rows = all_rows(data, "train")
    seen = torch.cat([data.batch(step) for step in range(2 * len(rows) // 10)]).tolist()
    first, second = seen[: len(rows)], seen[len(rows) :]
    assert Counter(map(tuple, first)) == Counter(map(tuple, rows))
    assert not Counter(map(tuple, second)) - Counter(map(tuple, rows))
    assert first != rows and first[: len(second)] != second


def test_batches_are_int64_and_labels_are_the_next_tokens(stories):
    x, y = tokens(stories, labels="next").batch(0)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    rows = {tuple(row) for row in all_rows(tokens(stories, labels="next"), "train")}
    assert all((*a, b[-1]) in rows for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert tokens(stories).batch(0).shape == (8, 16)


def test_batches_are_functions_of_seed_and_step_and_repeat(stories):
    data = tokens(stories)
    assert torch.equal(data.batch(5), tokens(stories).batch(5))
    others = [data.batch(6), data.batch(5, "eval"), tokens(stories, seed=1).batch(5)]
    assert all(not torch.equal(data.batch(5), other) for other in others)


def test_the_order_does_not_depend_on_the_batch_size(stories):
    small, large = tokens(stories, batch_size=4, eval_batches=1), tokens(stories, batch_size=12)
    assert torch.equal(torch.cat([small.batch(step) for step in (3, 4, 5)]), large.batch(1))


def test_eval_batches_are_the_same_every_time_and_for_every_seed(stories):
    loader = tokens(stories).val_dataloader()
    first, second, other = list(loader), list(loader), list(tokens(stories, seed=1).val_dataloader())
    assert len(first) == 2 and not torch.equal(*first)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, other, strict=True))


def test_no_document_is_on_both_sides_and_duplicates_stay_together(write_json):
    texts = [*STORIES, *STORIES[::3], *STORIES[::7]]
    data = tokens(write_json(texts))
    train, held_out = texts_of(data.tokens.train), texts_of(data.tokens.eval)
    assert not set(train) & set(held_out) and not set(data.tokens.train.keys) & set(data.tokens.eval.keys)
    assert Counter(train + held_out) == Counter(texts)


def test_a_document_stays_on_its_side_whatever_stands_around_it(write_json):
    held_out = set(texts_of(tokens(write_json(STORIES)).tokens.eval))
    fewer = set(texts_of(tokens(write_json(STORIES[::-2], "fewer.jsonl")).tokens.eval))
    assert fewer == held_out & set(STORIES[::-2]) and 0.2 < len(held_out) / len(STORIES) < 0.4


def test_a_training_document_that_equals_an_eval_document_is_not_trained_on(write_json):
    held_out = write_json(STORIES[:100], "eval.jsonl")
    corpus = {"train": [write_json(STORIES[50:])], "eval": [held_out], "eval_fraction": None}
    data = tokens("", corpus=corpus)
    assert texts_of(data.tokens.eval) == STORIES[:100] and texts_of(data.tokens.train) == STORIES[100:]


def test_ids_are_taken_as_they_are_with_one_end_each(write_json):
    ids = [[i % 50, i % 7, 3] for i in range(300)]
    path = write_json([[*row, 99] if row[0] % 2 else row for row in ids], column="ids")
    data = tokens(path, corpus={"column": "ids"}, tokenizer=PlainIds(vocab_size=100, end_id=99), batch_size=4)
    line = data.tokens.train.span(0, len(data.tokens.train)).reshape(-1, 4)
    assert (line[:, 3] == 99).all() and set(map(tuple, line[:, :3].tolist())) <= set(map(tuple, ids))
    assert data.decode([3, 99]) == [" 3", " 99"]


def test_rows_that_cross_chunks_are_whole(stories, monkeypatch):
    expected = all_rows(tokens(stories), "train")
    monkeypatch.setattr("pdlightning.data.token_store.TOKENS_IN_A_CHUNK", 100)
    monkeypatch.setattr("pdlightning.data.token_store.AT_ONCE", 3)
    monkeypatch.setattr("pdlightning.data.token_store.FORMAT_VERSION", -1)
    data = tokens(stories)
    assert len(data.tokens.train.chunks) > 20 and all_rows(data, "train") == expected


def test_unigram_entropy_is_that_of_the_smoothed_training_frequencies(stories):
    data = tokens(stories)
    count = Counter(i for text in texts_of(data.tokens.train) for i in [*text.encode(), END])
    total = sum(count.values()) + 257
    losses = [-np.log((count[i] + 1) / total) for text in texts_of(data.tokens.eval) for i in [*text.encode(), END]]
    assert data.unigram_entropy() == pytest.approx(np.mean(losses), rel=1e-12)


def test_making_batches_leaves_the_global_generators_alone(stories):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = tokens(stories)
    data.batch(0)
    list(data.val_dataloader())
    assert torch.equal(state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()


class Rank:
    """What data ask of a trainer in a process group."""

    def __init__(self, rank, ranks):
        self.global_rank, self.world_size = rank, ranks
        self.global_step, self.accumulate_grad_batches = 0, 1


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_ranks_share_out_the_batch_of_one_process(stories, ranks, split):
    parts = []
    for rank in range(ranks):
        data = tokens(stories)
        data.trainer = Rank(rank, ranks)
        parts.append(data.batch(1, split))
    assert torch.equal(torch.cat(parts), tokens(stories).batch(1, split))


def test_a_batch_that_does_not_split_over_the_ranks_is_an_error_of_setup(stories):
    data = tokens(stories)
    data.trainer = Rank(0, 3)
    with pytest.raises(ValueError, match=r"batch_size 8 .* 3 ranks"):
        data.setup()


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_training_goes_on_where_it_stopped(stories, tmp_path):
    def fit(steps, ckpt_path=None):
        module = Recorder()
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, datamodule=tokens(stories), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.seen

    seen = fit(3) + fit(5, tmp_path / "3.ckpt")
    assert len(seen) == 10
    assert all(torch.equal(batch, tokens(stories).batch(step)) for step, batch in enumerate(seen))


@pytest.fixture
def openings(monkeypatch):
    """The corpora that were opened."""
    opened, open_files = [], LocalFiles.open
    monkeypatch.setattr(LocalFiles, "open", lambda corpus: opened.append(corpus) or open_files(corpus))
    return opened


def test_stored_tokens_are_found_again_without_reading_a_document(stories, openings):
    tokens(stories).setup()
    for again in (tokens(stories), tokens(stories, n_ctx=9, batch_size=3, seed=4, labels="next")):
        again.setup()
    assert len(openings) == 1


def test_other_documents_or_another_tokenizer_are_other_tokens(stories, openings):
    several = [tokens(stories), tokens(stories, corpus={"eval_fraction": 0.4})]
    several += [tokens(stories, tokenizer=TrainedTokenizer(vocab_size=n)) for n in (270, 280)]
    assert len({data.fingerprint for data in several}) == len(openings) == 4
    os.utime(stories, ns=(1, 1))
    assert tokens(stories).fingerprint == several[0].fingerprint and len(openings) == 5


@pytest.mark.parametrize("damage", ["byte", "missing", "record", "tokenizer"])
def test_damaged_tokens_are_reported_and_made_again(stories, openings, cache, damage):
    def data():
        return tokens(stories, tokenizer=TrainedTokenizer(vocab_size=280))

    expected = data().batch(0)
    (folder,) = [path for path in (cache / "data").iterdir() if path.is_dir()]
    if damage == "byte":
        content = bytearray((folder / "train.arrow").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "train.arrow").write_bytes(content)
    elif damage == "missing":
        (folder / "eval.arrow").unlink()
    elif damage == "record":
        (folder / "record.json").write_text("{")
    else:
        (folder / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="stored tokens .* damaged .* made again"):
        again = data().batch(0)
    assert torch.equal(again, expected) and len(openings) == 2
    data().setup()
    assert len(openings) == 2


def test_a_failure_while_tokenising_leaves_nothing_behind(stories, cache, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokens(stories).setup()
    assert not [path for path in (cache / "data").iterdir() if path.suffix != ".lock"]


def test_two_who_want_the_same_tokens_at_once_make_them_once(stories, openings):
    with ThreadPoolExecutor(max_workers=2) as pool:  # the lock is one of files, between threads as between processes
        first, second = pool.map(lambda data: data.batch(0), [tokens(stories), tokens(stories)])
    assert torch.equal(first, second) and len(openings) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_ctx": 0}, "n_ctx must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"labels": "last"}, "labels must be none or next, got 'last'"),
        ({"n_ctx": 5000, "eval_batches": 1}, r"eval split .* 0 rows of 5000, and 8 rows are asked for in 1 batches"),
        ({"eval_batches": 500}, r"eval split .* and 4000 rows are asked for in 500 batches: lower"),
        ({"corpus": {"column": "story"}}, r"no column 'story'. Its columns are text, n\."),
        ({"corpus": {"column": "n"}}, r"column 'n' .* text or lists of ints, and holds 1\."),
        ({"corpus": {"eval": [EMPTY], "eval_fraction": None}}, "has no eval documents: its eval data hold none"),
        (
            {"corpus": {"eval_fraction": 1e-9}},
            "no eval documents: eval_fraction 1e-09 holds out .*; raise it",
        ),
        ({"corpus": {"eval_fraction": 1 - 1e-9}}, r"no training documents; its eval_fraction is 0.99"),
        ({"corpus": {"eval_fraction": 1.0}}, r"eval_fraction must be in \(0, 1\), got 1.0"),
        ({"corpus": {"format": "parquet"}}, r"1 local parquet file\(s\) cannot be read"),
        ({"tokenizer": PlainIds(vocab_size=9, end_id=8)}, "documents are text, and PlainIds takes ids"),
        ({"tokenizer": TrainedTokenizer(vocab_size=5000)}, r"give \d+ tokens at most, and vocab_size is 5000"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(stories, write_json, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write_json(["", ""], EMPTY)
    with pytest.raises(ValueError, match=message):
        tokens(stories, **changes).setup()


def test_too_few_training_rows_for_a_batch_are_an_error(write_json):
    corpus = {"train": [write_json(STORIES[:9])], "eval": [write_json(STORIES[9:], "eval.jsonl")]}
    with pytest.raises(ValueError, match=r"training split .* and 8 rows are asked for: lower batch_size"):
        tokens("", corpus={**corpus, "eval_fraction": None}, n_ctx=32).setup()


@pytest.mark.parametrize("wrong", [-1, 100])
def test_ids_that_the_tokenizer_does_not_have_are_an_error(write_json, wrong):
    path = write_json([[1, 2, i] for i in range(50)] + [[4, wrong]], column="ids")
    data = tokens(path, corpus={"column": "ids"}, tokenizer=PlainIds(vocab_size=100, end_id=0))
    with pytest.raises(ValueError, match=rf"holds the id {wrong}, and the tokenizer has 0..99"):
        data.setup()


def test_the_vocabulary_of_the_model_must_be_the_tokenizers_up_to_padding(stories):
    data = tokens(stories, tokenizer=PlainIds(vocab_size=50257, end_id=0))
    for fits in (50257, 50304, 51200):
        check_vocabulary(data, fits)
    with pytest.raises(ValueError, match="50257 ids and the model only 1024"):
        check_vocabulary(data, 1024)
    with pytest.raises(ValueError, match="128256 ids and the tokenizer only 50257"):
        check_vocabulary(data, 128256)


def test_a_row_must_fit_into_the_context_of_the_model(stories):
    check_context(tokens(stories, labels="next"), 16)
    with pytest.raises(ValueError, match=r"n_ctx 16 .* context of 15"):
        check_context(tokens(stories), 15)


def test_a_cache_moved_elsewhere_is_still_good(stories, cache, tmp_path, monkeypatch, openings):
    expected = tokens(stories).batch(0)
    shutil.move(cache, tmp_path / "elsewhere")
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "elsewhere"))
    assert torch.equal(tokens(stories).batch(0), expected) and len(openings) == 1


CONFIGS = Path(__file__).parents[2] / "conf" / "data"
TARGET = {"seed": 3, "target": {"model": {"vocab_size": 300, "n_ctx": 24}}}


def config_of(name):
    return to_plain(OmegaConf.merge(TARGET, {"data": OmegaConf.load(CONFIGS / f"{name}.yaml")}))["data"]


@pytest.mark.parametrize("name", ["python_stdlib", "simplestories", "tinystories", "pile", "openwebtext"])
def test_configs_bind_to_what_they_name_and_download_nothing(name):
    config = config_of(name)
    validate(config)
    instantiate(config["corpus"])
    assert not config["corpus"].get("download") and not config["tokenizer"].get("download")


def test_the_config_of_the_standard_library_gives_tokens_for_its_target(tmp_path, monkeypatch):
    for i in range(200):
        (tmp_path / f"module{i}.py").write_text(f"def number_{i}():\n    return {i}\n" * 40)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    data = instantiate({**config_of("python_stdlib"), "batch_size": 4})
    data.setup()
    check_vocabulary(data, 300)
    check_context(data, 24)
    assert data.batch(0).shape == (4, 24) and data.seed == 3 and "def" in "".join(data.decode(data.batch(0)[0]))
