"""The model card, and the push to a hub: a server on this machine that says what the real client sent."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from rltrain.export import __main__ as command
from rltrain.export.card import card, front_matter
from rltrain.runs import run_folder


@pytest.fixture
def run(tmp_path):
    """1 of 4 held-out problems right, then 3 of 4; a third evaluation comes after the checkpoint."""
    folder = tmp_path / "run"
    for step, right in ((0, 1), (2, 3)):
        rows = [
            {"problem_id": f"p{i}", "sample": 0, "reward": float(i < right), "reward/answer": float(i < right)}
            for i in range(4)
        ]
        run_folder.write_samples(folder, f"eval_step_{step:06d}", rows)
    lines = [{"step": 0, "eval_accuracy": 0.25}, {"step": 2, "eval_accuracy": 0.75}, {"step": 4, "eval_accuracy": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "name": "my run", "steps": 4, "seed": 7, "model": {"kind": "hub", "path": "org/base-1B"},
        "data": {"kind": "random_calculation"}, "rewards": {"answer": {"kind": "exact"}},
        "advantage": {"kind": "tempo"}, "batch": {"prompts_per_step": 16, "group_size": 8},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["/usr/bin/python", "-m", "rltrain.train", "+experiment=quickstart", "seed=7"]
    (folder / "run.json").write_text(json.dumps({"command": command, "git_revision": "abc1234"}))
    return folder


def test_the_card_holds_the_runs_table_up_to_the_checkpoint(run):
    text = card(run, step=2, adapters=False)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", "reinforcement-learning"],
        "base_model": "org/base-1B",
    }
    assert "# my run" in body and "| advantage | tempo |" in body and "| steps | 2 of 4 |" in body
    assert "| completions a step | 16 prompts, 8 completions each |" in body
    # Wilson's interval of 1 and 3 of 4; Student's t of the differences 0, 1, 1, 0: 0.5 ± 3.182·0.5774/2.
    assert "| metric | step 0 | step 2 | change |" in body
    assert "| eval_accuracy | 25.0 % (4.6 to 69.9) | 75.0 % (30.1 to 95.4) | +50.0 points (-41.9 to +141.9) |" in body
    assert "    python -m rltrain.train +experiment=quickstart seed=7" in body and "abc1234" in body


def test_adapters_and_local_models_have_other_metadata(tmp_path):
    front = front_matter({"model": {"kind": "hub", "path": str(tmp_path)}}, adapters=True)
    assert yaml.safe_load(front.strip("-\n")) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", "reinforcement-learning", "lora"],
    }


def test_an_empty_folder_gives_a_card_without_results(tmp_path):
    assert "No held-out evaluation was run." in card(tmp_path, step=1, adapters=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/run", "--to", "out"], "/no/such/run: no such folder; give the folder of a run or a checkpoint"),
        ([".", "--to", "out"], ".: holds no intact checkpoint; give a folder step_… or the run_dir around it"),
    ],
)
def test_wrong_folders_end_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err == f"config error: {message}\n"


class Hub(BaseHTTPRequestHandler):
    """Answers what the client asks when it makes a repository and commits small files to it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked[self.path] = body
        files = json.loads(body).get("files", []) if self.path.endswith("/preupload/main") else []
        answers = {
            "/api/repos/create": {"url": f"{self.server.address}/me/model", "id": "me/model", "name": "me/model"},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/me/model/preupload/main": {
                "files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            },
            "/api/models/me/model/commit/main": {"commitUrl": f"{self.server.address}/c/1", "commitOid": "1"},
        }
        answer = json.dumps(answers.get(self.path, {})).encode()
        self.send_response(200 if self.path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pushed(folder, endpoint):
    code = "import sys; from pathlib import Path; from rltrain.export.hub import push\n"
    code += "print(push(Path(sys.argv[1]), 'me/model', private=True, step=3))"
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_push_makes_the_repository_and_commits_the_folder(tmp_path, hub):
    (tmp_path / "README.md").write_text("---\ntags: [rltrain]\n---\n# card\n")
    (tmp_path / "config.json").write_text("{}")
    result = pushed(tmp_path, hub.address)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{hub.address}/me/model"
    created = json.loads(hub.asked["/api/repos/create"])
    assert created["name"] == "model" and created["organization"] == "me"
    commit = [json.loads(line) for line in hub.asked["/api/models/me/model/commit/main"].splitlines()]
    assert commit[0]["value"]["summary"] == "rltrain: checkpoint of step 3"
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in commit if one["key"] == "file"}
    assert sent == {"README.md": (tmp_path / "README.md").read_bytes(), "config.json": b"{}"}


def test_a_hub_that_refuses_is_named(tmp_path, hub):
    (tmp_path / "config.json").write_text("{}")
    result = pushed(tmp_path, f"{hub.address}/elsewhere")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("rltrain.errors.RunError: --hub me/model: not pushed (")
