"""transformers' own server, with an answer where it has none: what a chat template refuses is a client's error, not a 500.

So is a prompt of more tokens than the model has positions for. A text ends with these, as by its own `max_tokens`.
"""

import re
from functools import wraps
from typing import Any, Final

from transformers.cli.serve import Serve

from seedlm.integrations.transformers.generate import NoRoomError, room
from seedlm.modeling.quantize import set_backend

_OF_TEMPLATES: Final = re.compile("chat.?template", re.IGNORECASE)


class Server(Serve):
    """Serves one model at http://HOST:PORT/v1 until it is stopped.

    backend   how packed layers multiply (`modeling.quantize.set_backend`)
    options   the other ones of transformers' server
    Raises BackendError for a backend that cannot be had, before anything is served.
    """

    def __init__(self, model: str, *, backend: str = "auto", **options: Any) -> None:
        self._model, self._backend = model, backend
        super().__init__(force_model=model, non_blocking=True, **options)

    def start_server(self) -> None:
        """Run in this thread; transformers starts another one, from here, when it is asked not to block."""
        from jinja2 import TemplateError

        for loaded in self._model_manager.loaded_models.values():
            if self._backend != "auto":
                set_backend(loaded.model, self._backend)
            _end_with_positions(loaded.model)
        app = self.server.config.app
        app.add_exception_handler(ValueError, self._no_template)
        app.add_exception_handler(TemplateError, self._refused_by_template)
        app.add_exception_handler(NoRoomError, self._no_room)
        self.server.run()

    async def _no_template(self, request: Any, reason: Exception) -> Any:
        if not _OF_TEMPLATES.search(str(reason)):
            raise reason
        return refusal(
            f"{self._model} has no chat template, so it only goes on from a text: ask for /v1/completions with a prompt",
            "no_chat_template",
        )

    async def _no_room(self, request: Any, reason: Exception) -> Any:
        return refusal(str(reason), "context_length_exceeded")

    async def _refused_by_template(self, request: Any, reason: Exception) -> Any:
        return refusal(f"the chat template of {self._model} does not take these messages: {reason}", "messages_refused")


def _end_with_positions(model: Any) -> None:
    """Let a model generate no more tokens than it has positions for. Raises NoRoomError where it is asked if there are none."""
    generate = model.generate

    @wraps(generate)
    def within(*args: Any, **inputs: Any) -> Any:
        ids: Any = inputs.get("input_ids")
        config: Any = inputs.get("generation_config")
        left = None if ids is None else room(model, ids.shape[1], "the prompt")
        if left is not None and config is not None and config.max_new_tokens is not None and config.max_new_tokens > left:
            config.max_new_tokens = left  # the server reads it again, to say that this was why a text ended
        return generate(*args, **inputs)

    model.generate = within


def refusal(message: str, code: str) -> Any:
    """An answer 400 in the shape of OpenAI's errors."""
    from fastapi.responses import JSONResponse

    error = {"message": message, "type": "invalid_request_error", "param": "messages", "code": code}
    return JSONResponse({"error": error}, status_code=400)
