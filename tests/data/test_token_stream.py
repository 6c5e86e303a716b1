"""Streamed corpora: what a run sees, and that a resumed one sees the same."""

import numpy as np
import pytest
import torch
from lightning import Trainer
from recorder import Recorder

from pdlightning.checkpoints import AtomicCheckpointIO
from pdlightning.data import ByteTokenizer, LocalFiles, Tokens

END = 256
STORIES = [f"<{i}>" + "abcdefghij"[i % 10] * (5 + 7 * i % 23) for i in range(400)]


@pytest.fixture
def files(write_json):
    return [write_json(STORIES[part::3], f"part{part}.jsonl") for part in range(3)]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """Many reads in little text."""
    monkeypatch.setattr("pdlightning.data.token_stream.AT_ONCE", 5)


def stream(files, *, corpus=None, **changes):
    options = {"format": "json", "column": "text", "train": files, "eval_fraction": 0.3, "streaming": True}
    arguments = {"n_ctx": 16, "batch_size": 4, "eval_batches": 2, "seed": 0, "labels": "none"}
    return Tokens(corpus=LocalFiles(**options | (corpus or {})), tokenizer=ByteTokenizer(), **arguments | changes)


class Rank:
    """What data ask of a trainer in a process group."""

    def __init__(self, rank, ranks, step=0, accumulate=1):
        self.global_rank, self.world_size = rank, ranks
        self.global_step, self.accumulate_grad_batches = step, accumulate


def first_batches(data, n):
    return [batch for _, batch in zip(range(n), data.train_dataloader(), strict=False)]


def texts_of(ids):
    line = np.concatenate([[END], np.asarray(ids).reshape(-1)])
    ends = np.flatnonzero(line == END)
    return [bytes(line[a + 1 : b].tolist()).decode() for a, b in zip(ends, ends[1:], strict=False)]


def trained_on(files, **options):
    """The training texts in the order of the files, from a corpus that is tokenised once."""
    data = stream(files, corpus={"streaming": False, **options})
    train = data.tokens.train
    return texts_of(train.span(0, len(train)))


def test_batches_are_the_training_documents_in_their_order_again_and_again(files):
    data = stream(files)
    texts = trained_on(files)
    line = [i for text in texts for i in [*text.encode(), END]]
    batches = first_batches(data, 3 * len(line) // 64)
    assert all(batch.shape == (4, 16) and batch.dtype == torch.int64 for batch in batches)
    seen = torch.cat(batches).flatten().tolist()
    assert seen == (line * 3)[: len(seen)] and len(seen) > 2 * len(line)


def test_labels_of_a_stream_are_the_next_tokens(files):
    (x, y) = first_batches(stream(files, labels="next"), 1)[0]
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])


def test_what_is_evaluated_is_not_trained_on(files, write_json):
    evaluated = stream(files)
    held_out = evaluated.tokens.eval
    assert not set(texts_of(held_out.span(0, len(held_out)))) & set(trained_on(files))
    assert all(batch.shape == (4, 16) for batch in evaluated.val_dataloader())

    of_its_own = {"eval": [write_json(STORIES[100:200], "eval.jsonl")], "eval_fraction": None}
    seen = texts_of(torch.cat(first_batches(stream(files, corpus=of_its_own), 60)))
    used = stream(files, corpus=of_its_own).tokens.eval
    assert not set(seen) & set(texts_of(used.span(0, len(used)))) and len(seen) > 100


def test_a_streamed_corpus_keeps_no_more_for_evaluation_than_is_asked_for(write_json, monkeypatch):
    monkeypatch.setattr("pdlightning.data.token_store.AT_ONCE", 5)
    monkeypatch.setattr("pdlightning.data.token_store.SAMPLE_OF_A_STREAM", 500)
    many = [f"{i} " * 10 for i in range(2000)]
    data = stream([write_json(many)])
    assert 128 <= len(data.tokens.eval) < 500 <= len(data.tokens.train) < 1000
    assert 1.0 < data.unigram_entropy() < np.log(257)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_documents(files, ranks):
    seen = []
    for rank in range(ranks):
        data = stream(files, batch_size=6)
        data.trainer = Rank(rank, ranks)
        batches = first_batches(data, 400)
        assert batches[0].shape == (6 // ranks, 16)
        seen.append(set(texts_of(torch.cat(batches))))
    assert set.union(*seen) == set(trained_on(files))
    assert all(not seen[a] & seen[b] for a in range(ranks) for b in range(a))


@pytest.mark.parametrize("stop", [1, 2, 7, 30, 61, 62, 63, 95])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_stream_goes_on_where_it_stopped(files, stop, ranks):
    expected, positions = [], []
    for rank in range(ranks):
        data = stream(files)
        data.trainer = Rank(rank, ranks)
        batches = iter(data.train_dataloader())
        expected.append([next(batches) for _ in range(stop + 2)])  # fetched before they are used
        data.trainer.global_step = stop
        positions.append(data.state_dict()["ranks"][0])
        expected[rank] += [next(batches) for _ in range(40)]
    for rank in range(ranks):
        resumed = stream(files)
        resumed.trainer = Rank(rank, ranks, step=stop)
        resumed.load_state_dict({"batch": stop, "ranks": positions})
        assert all(map(torch.equal, first_batches(resumed, 42), expected[rank][stop:]))


def fit(data, steps, ckpt_path=None, save_to=None):
    module = Recorder()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return module.seen


@pytest.mark.filterwarnings("ignore")
def test_a_training_resumed_from_its_checkpoint_sees_what_it_would_have_seen(files, tmp_path):
    seen = fit(stream(files), 5, save_to=tmp_path / "5.ckpt") + fit(stream(files), 9, tmp_path / "5.ckpt")
    assert all(map(torch.equal, seen, first_batches(stream(files), 18))) and len(seen) == 18


@pytest.mark.filterwarnings("ignore")
def test_a_corpus_that_is_tokenised_once_leaves_nothing_in_a_checkpoint(files, tmp_path):
    fit(stream(files, corpus={"streaming": False}), 2, save_to=tmp_path / "2.ckpt")
    assert "Tokens" not in torch.load(tmp_path / "2.ckpt", weights_only=True)


def test_a_stream_does_not_guess_where_it_was(files):
    data = stream(files)
    data.trainer = Rank(0, 1, step=3)
    with pytest.raises(ValueError, match="position of the stream at batch 3 is not known"):
        first_batches(data, 1)
    data.load_state_dict({"batch": 3, "ranks": [{}, {}]})
    with pytest.raises(ValueError, match="positions of 2 ranks in the stream, and there are 1"):
        first_batches(data, 1)
    with pytest.raises(ValueError, match="come one after the other"):
        data.batch(0)


def test_a_rank_without_a_document_is_an_error(write_json):
    data = stream([write_json(STORIES)], batch_size=500, n_ctx=2, eval_batches=1)
    data.trainer = Rank(499, 500)
    with pytest.raises(ValueError, match="no training documents for this rank"):
        first_batches(data, 1)


def position_of_rank(rank, address, queue):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    from pdlightning.data.tokens import gathered

    queue.put((rank, gathered({"left": torch.tensor([rank]), "documents": {"shard": rank}})))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_holds_the_positions_of_all_ranks(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    processes = [context.Process(target=position_of_rank, args=(rank, address, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for _, positions in (queue.get(timeout=200) for _ in processes):
        assert [position["documents"]["shard"] for position in positions] == [0, 1]
        assert [position["left"].item() for position in positions] == [0, 1]
    for process in processes:
        process.join()
