import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.trainer_cli import run_trainer

FIELDS = {
    "demasker": {"text", "token_ids", "source_text", "source_token_ids", "token_accuracy"},
    "autoencoder": {"text", "token_ids", "source_text", "source_token_ids", "token_accuracy"},
    "prior": {"text", "token_ids"},
}


@pytest.mark.parametrize("stage", FIELDS)
def test_predict_writes_a_line_for_each_text(stage: str, tiny_system: Any, tmp_path: Path) -> None:
    path, data = tmp_path / "new" / "texts.jsonl", tiny_system.data()
    arguments = tiny_system.arguments(
        "predict",
        stage,
        f"--ckpt_path={tiny_system.checkpoint(stage)}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.callbacks=[]",
        "--trainer.callbacks+=JsonLinesWriter",
        f"--trainer.callbacks.output={path}",
        "--trainer.limit_predict_batches=2",
        "--data.init_args.batch_size=11",
    )
    run_trainer(arguments)
    lines = path.read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 22
    for row in rows:
        assert set(row) == FIELDS[stage]
        assert len(row["token_ids"]) == 32 and row["text"] == data.codec.decode(row["token_ids"])
    if "source_text" in FIELDS[stage]:
        source = torch.tensor([row["source_token_ids"] for row in rows])
        assert torch.equal(source, data.blocks("test")[:22])
        assert all(row["source_text"] == data.codec.decode(row["source_token_ids"]) for row in rows)
        assert all(0 <= row["token_accuracy"] <= 1 for row in rows)
    run_trainer(arguments)
    assert path.read_text() == lines  # written anew, not appended to
