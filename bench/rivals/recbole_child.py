"""The script of RecBole's process: trains its SASRec, ranks and times it, as asked by JSON lines on standard input.

It runs in an interpreter that has RecBole and needs nothing of adrec. Every request is an object with ``do``; every
answer is one object, ``{"error": ...}`` for a failure; while it trains, lines ``{"progress": ...}`` come before it.
Item ids are adrec's, 1 to N; RecBole's own differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

NAME = "rival"
"""Name of the data set, as in the names of its files."""
SCORES = 2**25
"""Scores that one batch of an evaluation may hold."""
TIE = 1e-6
"""Scores that are this close, relatively, count against the target, as in adrec's evaluation."""

Say = Callable[[dict[str, Any]], None]


def settings_of(request: dict[str, Any]) -> dict[str, Any]:
    """RecBole's settings: the sizes that were asked for, its own defaults for what trains the model.

    The feed-forward layer is four times as wide as the model, the ratio of RecBole's defaults.
    """
    chosen = {
        "data_path": request["folder"],
        "benchmark_filename": ["train", "validation", "validation"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
        "alias_of_item_id": ["item_id_list"],
        "MAX_ITEM_LIST_LENGTH": request["max_length"],
        "hidden_size": request["width"],
        "inner_size": 4 * request["width"],
        "n_layers": request["blocks"],
        "n_heads": request["heads"],
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "eval_args": {"order": "TO", "mode": "full"},
        "metrics": ["NDCG"],
        "topk": [20],
        "valid_metric": "NDCG@20",
        "eval_batch_size": max(1, min(4096, SCORES // request["items"])),
        "use_gpu": False,
    }
    return chosen if request["epochs"] is None else chosen | {"epochs": request["epochs"]}


class Sasrec:
    """RecBole's SASRec, trained on the files of a folder with its own trainer."""

    def __init__(self, request: dict[str, Any], say: Say) -> None:
        import torch
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, get_trainer, init_seed

        torch.set_num_threads(request["threads"])
        config = Config(model="SASRec", dataset=NAME, config_dict=settings_of(request))
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train, validation, _ = data_preparation(config, dataset)
        self.model = get_model("SASRec")(config, train.dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, self.model)
        self.epochs, self.epochs_most, best = 0, trainer.epochs, {}

        def after(epoch: int, score: float) -> None:
            # RecBole would read its best weights back with `torch.load`, which refuses its files since torch 2.6.
            if trainer.cur_step == 0:
                best.update({name: value.clone() for name, value in self.model.state_dict().items()})
            self.epochs = epoch + 1
            say({"progress": {"epoch": self.epochs, "of": trainer.epochs, "ndcg20_percent": 100.0 * float(score)}})

        trainer.fit(train, validation, verbose=False, saved=False, callback_fn=after)
        self.model.load_state_dict(best)
        self.model.eval()
        tokens = dataset.field2token_id["item_id"]
        self.item_ids = torch.tensor([0, *(tokens[str(item)] for item in range(1, request["items"] + 1))])
        self.own_ids = torch.zeros(len(tokens), dtype=torch.int64)
        self.own_ids[self.item_ids] = torch.arange(request["items"] + 1)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, in hexadecimal."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def packed(self, histories: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """The most recent items as RecBole's ids back to back, and how many there are of each user."""
        import torch

        rows = [row[-self.model.max_seq_length :] for row in histories]
        ids = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
        return self.item_ids[ids], torch.tensor([len(row) for row in rows])

    def scores(self, packed: tuple[Any, Any]) -> Any:
        """Scores of the catalogue by RecBole's full-sort path, `[B, N + 1]` float32; padding is never chosen."""
        import torch
        from recbole.data.interaction import Interaction

        ids, lengths = packed
        with torch.no_grad():
            # RecBole pads on the right, to its longest.
            padded = ids.new_zeros(lengths.numel(), self.model.max_seq_length)
            padded[torch.arange(padded.shape[1]) < lengths[:, None]] = ids
            batch = Interaction({self.model.ITEM_SEQ: padded, self.model.ITEM_SEQ_LEN: lengths})
            scores = self.model.full_sort_predict(batch)
            scores[:, 0] = -torch.inf
            return scores

    def recommend(self, packed: tuple[Any, Any], count: int) -> Any:
        """What is timed: RecBole's ids in, RecBole's ids of the best items out, `[B, count]` int64."""
        return self.scores(packed).topk(count, -1).indices

    def rank(self, histories: Sequence[Sequence[int]], targets: Sequence[int], count: int) -> dict[str, Any]:
        """Each target's rank, 0 is best, and each user's best items."""
        import torch

        ranks, tops, size = [], [], max(1, min(512, SCORES // len(self.own_ids)))
        for first in range(0, len(targets), size):
            scores = self.scores(self.packed(histories[first : first + size]))
            ranks += ranks_of(scores, self.item_ids[torch.tensor(targets[first : first + size])]).tolist()
            tops += self.own_ids[scores.topk(count, -1).indices].tolist()
        return {"ranks": ranks, "top_items": tops}


def ranks_of(scores: Any, targets: Any) -> Any:
    """Rank of each target `[B]` among scores `[B, N + 1]`, 0 is best; ties and what is no number count against it."""
    own = scores.gather(1, targets[:, None])
    at_least = ~(scores < own - TIE * own.abs())
    return at_least.sum(1) - 1


def timed(call: Callable[[int], Any], number: int, seconds: float, most: int) -> list[float]:
    """Milliseconds of calls one after the other, from ``number`` on: one at least, as many as fit the seconds."""
    turn: list[float] = []
    spent = 0.0
    while not turn or (spent + turn[-1] < 1e3 * seconds and len(turn) < most):
        start = time.perf_counter_ns()
        call(number + len(turn))
        turn.append((time.perf_counter_ns() - start) / 1e6)
        spent += turn[-1]
    return turn


class Server:
    """Answers requests in the order in which they come."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def versions(self) -> dict[str, Any]:
        """Versions of what computes here; without RecBole the reason."""
        try:
            import recbole.config
            import torch
        except ImportError as error:
            return {"missing": f"{error}"}
        found = {"recbole": recbole.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
        return {"versions": {name if name == "recbole" else f"recbole's {name}": each for name, each in found.items()}}

    def train(self, **request: Any) -> dict[str, Any]:
        self.rival = Sasrec(request, self.say)
        return {"epochs": self.rival.epochs, "most": self.rival.epochs_most, "fingerprint": self.rival.fingerprint()}

    def rank(self, **request: Any) -> dict[str, Any]:
        return self.rival.rank(**request)

    def batches(self, batches: Sequence[Sequence[Sequence[int]]], count: int) -> dict[str, Any]:
        """Keep batches of histories for `time`."""
        packed = [self.rival.packed(each) for each in batches]
        self.call = lambda number: self.rival.recommend(packed[number % len(packed)], count)
        return {}

    def time(self, **request: Any) -> dict[str, Any]:
        return {"ms": timed(self.call, **request)}


def main() -> None:
    """Answer until standard input ends."""
    # What RecBole prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    server = Server(say)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)


if __name__ == "__main__":
    main()
