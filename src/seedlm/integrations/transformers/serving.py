"""transformers' own server, with an answer where it has none: what a chat template refuses is a client's error, not a 500."""

import re
from typing import Any, Final

from transformers.cli.serve import Serve

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

        if self._backend != "auto":
            for loaded in self._model_manager.loaded_models.values():
                set_backend(loaded.model, self._backend)
        app = self.server.config.app
        app.add_exception_handler(ValueError, self._no_template)
        app.add_exception_handler(TemplateError, self._refused_by_template)
        self.server.run()

    async def _no_template(self, request: Any, reason: Exception) -> Any:
        if not _OF_TEMPLATES.search(str(reason)):
            raise reason
        return refusal(
            f"{self._model} has no chat template, so it only goes on from a text: ask for /v1/completions with a prompt",
            "no_chat_template",
        )

    async def _refused_by_template(self, request: Any, reason: Exception) -> Any:
        return refusal(f"the chat template of {self._model} does not take these messages: {reason}", "messages_refused")


def refusal(message: str, code: str) -> Any:
    """An answer 400 in the shape of OpenAI's errors."""
    from fastapi.responses import JSONResponse

    error = {"message": message, "type": "invalid_request_error", "param": "messages", "code": code}
    return JSONResponse({"error": error}, status_code=400)
