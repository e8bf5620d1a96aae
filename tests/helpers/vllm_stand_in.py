"""A server with the endpoints of `vllm serve` that the trainer calls. It samples with the weights that were pushed."""

import base64
import functools
import json
import queue
import threading
import uuid
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


WIRES = {}


class Nccl:
    """Stands in for ``torch.cuda.nccl`` within a process: a communicator is a queue that both sides know by its id."""

    @staticmethod
    def unique_id():
        made = uuid.uuid4().bytes * 8
        WIRES[made] = queue.Queue()
        return made

    @staticmethod
    def init_rank(ranks, unique_id, rank):
        assert (ranks, rank) == (2, 0)
        return WIRES[unique_id]

    @staticmethod
    def all_reduce(tensors, comms):
        comms[0].put(tensors[0].clone())

    @staticmethod
    def broadcast(tensors, root, comms):
        assert root == 0
        comms[0].put(tensors[0].clone())


class StandIn(ThreadingHTTPServer):
    """Serves ``model`` on a port of its own (or ``port``, to come back there) in a thread.

    After ``answers`` completions it is dead: it drops what it is asked and listens no more.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, model, *, port=0, answers=10**9, max_model_len=512, raw_logprobs=False, mute=False, gpu=False, joins=True
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.lock = model.eval(), threading.Lock()
        self.answers, self.max_model_len, self.raw_logprobs, self.mute = answers, max_model_len, raw_logprobs, mute
        self.failing, self.closing = False, threading.Event()
        self.version, self.paused, self.pushes, self.served = UNKNOWN, False, [], []
        self.gpu, self.workers, self.wire, self.updating, self.joins = gpu, 1, None, False, joins
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

    def join(self, info):
        """Take part in a communicator of the stand-in for NCCL, which begins with a sum of one number."""
        assert (info["rank_offset"], info["world_size"], info["packed"]) == (1, 1 + self.workers, False)
        self.wire = WIRES[base64.b64decode(info["nccl_unique_id_b64"])]
        assert self.wire.get(timeout=20).shape == (1,)

    def receive(self, update):
        """Every weight in the declared order, as NCCL would hand it over."""
        assert self.paused and self.updating, "weights were sent to a server at work"
        with torch.no_grad():
            for name, dtype, shape in zip(update["names"], update["dtype_names"], update["shapes"], strict=True):
                tensor = self.wire.get(timeout=20)
                assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape), name
                self.model.get_parameter(name).copy_(tensor)

    def weight_update(self, path, body):
        """The calls of vLLM's weight-transfer protocol."""
        if path == "/init_weight_transfer_engine":
            self.join(body["init_info"])
        elif path == "/start_weight_update":
            self.updating = True
        elif path == "/update_weights":
            self.receive(body["update_info"])
        elif path == "/finish_weight_update":
            self.updating, self.version = False, body["weight_version"]
            self.pushes.append(self.version)

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
                "/get_world_size": {"world_size": self.server.workers},
                "/server_info?config_format=json": {
                    "vllm_config": {"weight_transfer_config": {"backend": "nccl"} if self.server.gpu else None}
                },
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
        elif self.path == "/init_weight_transfer_engine" and not server.joins:
            self.reply({"error": "no room for a communicator"}, 500)
        elif self.path.endswith(("_weight_update", "_weights", "_weight_transfer_engine")):
            server.weight_update(self.path, body)
            self.reply({})
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
