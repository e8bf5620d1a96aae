"""A server with the endpoints of `vllm serve` that the trainer calls. It samples with the weights that were pushed."""

import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_run import config

from rltrain.rollout.sampling import sample, uniforms

UNKNOWN = "default"  # what vLLM calls the weights that it started with


@functools.cache
def tiny_model():
    return config(Path("unused")).model


class StandIn(ThreadingHTTPServer):
    """Serves ``model`` on a port of its own (or ``port``, to come back there) in a thread.

    After ``answers`` completions it is dead: it drops what it is asked and listens no more.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, model, *, port=0, answers=10**9, max_model_len=512, raw_logprobs=False, mute=False):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.lock = model.eval(), threading.Lock()
        self.answers, self.max_model_len, self.raw_logprobs, self.mute = answers, max_model_len, raw_logprobs, mute
        self.failing, self.closing = False, threading.Event()
        self.version, self.paused, self.pushes, self.served = UNKNOWN, False, [], []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A dropped connection is what some tests are about."""

    def load(self, folder):
        assert self.paused, "weights were pushed into a server at work"
        places = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]
        weights = {
            name: tensor for file in set(places.values()) for name, tensor in load_file(Path(folder) / file).items()
        }
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self.pushes.append(Path(folder).name)

    @torch.no_grad()
    def generate(self, asked):
        fields, ids = asked["sampling_params"], list(asked["token_ids"])
        key, content = torch.tensor([fields.get("seed", 0)]), []
        with self.lock:
            while len(content) < fields["max_tokens"]:
                logits = self.model(input_ids=torch.tensor([ids])).logits[:, -1]
                uniform = uniforms(key, torch.tensor([len(content)]))
                options = {"temperature": fields["temperature"], "top_p": fields.get("top_p", 1)}
                token, logprob = sample(logits, uniform, top_k=fields["top_k"], **options)
                if self.raw_logprobs:
                    logprob = logits.log_softmax(-1)[:, int(token)]
                ids.append(int(token))
                content.append({"token_id": int(token), "logprob": float(logprob)})
                if int(token) in fields.get("stop_token_ids", ()):
                    break
        version = [{"version": self.version, "start": 0, "end": len(content)}]
        choice = {"token_ids": ids[len(asked["token_ids"]) :], "logprobs": {"content": content}}
        finish = "stop" if len(content) < fields["max_tokens"] else "length"
        return {"choices": [choice | {"finish_reason": finish, "weight_versions": version}]}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *arguments):
        pass

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(
            {
                "/health": None,
                "/weight_info": {"weight_version": self.server.version},
                "/v1/models": {"data": [{"max_model_len": self.server.max_model_len}]},
            }[self.path]
        )

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/inference/v1/generate":
            self.generate(body)
        elif self.path.startswith(("/pause", "/resume")):
            server.paused = self.path.startswith("/pause")
            self.reply({})
        elif self.path == "/collective_rpc":
            assert body["method"] == "take_weights"
            server.load(body["kwargs"]["weights_path"])
            self.reply({"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.reply({"success": True})
        elif self.path == "/update_weight_version":
            server.version = body["new_version"]
            self.reply({})

    def generate(self, body):
        server = self.server
        server.served.append(body["sampling_params"].get("seed"))
        if server.mute:
            server.closing.wait()
            return
        if server.failing:
            self.reply({"error": "out of luck"}, 500)
            return
        if server.answers == 0:
            server.socket.close()  # new connections are refused, and this one ends without an answer
            return
        server.answers -= 1
        if body["token_ids"] == [1]:  # <eos>: no prompt begins with it
            self.reply({"error": "token_ids: refused"}, 400)
        else:
            self.reply(server.generate(body))
