"""``GET /sleb/manifest`` and the manifest's metrics, in vLLM's own API server.

vLLM loads an endpoint plugin only where ``VLLM_PLUGINS`` names it, as `sleb-serve serve` does.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from typing import Any

from sleb_serve.manifest.built import check_ranks, publish
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.protocol import ENTRY_POINT, MANIFEST_PATH
from sleb_vllm.verify import REPORT

_GRACE_SECONDS = 10.0
"""For open connections, once the engine has stopped."""


class ManifestEndpoint:
    """vLLM's endpoint plugin: what is served, from the ranks themselves."""

    name = ENTRY_POINT
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the route."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        async def manifest(request: Request) -> JSONResponse:
            content = getattr(request.app.state, "sleb", None)
            if content is None:
                return JSONResponse(
                    {"error": "this server serves a model with all of its blocks"}, 404
                )
            return JSONResponse(content)

        # FastAPI reads the annotations, which are text here.
        manifest.__annotations__ = {"request": Request, "return": JSONResponse}
        app.add_api_route(MANIFEST_PATH, manifest, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Ask every rank, refuse to serve if they differ from the manifest, and publish.

        Raises:
            SlebError: see `check_ranks`; the server does not start.
        """
        state.sleb = None
        if engine_client is None:
            return
        model_config = engine_client.vllm_config.model_config
        pruning = Pruning.of_config(model_config.hf_config)
        if pruning is None:
            return
        _Ending(engine_client)
        reports = await engine_client.collective_rpc(REPORT)
        check_ranks(pruning, reports)
        names = list(args.served_model_name or [model_config.model])
        state.sleb = {
            "tag": pruning.tag,
            "digest": pruning.digest,
            "served_model_name": names,
            "pruning": pruning.to_dict(),
            "ranks": reports,
        }
        publish(pruning, names[0], reports)


class _Ending:
    """Forces the process to exit after shutdown, with code 1 if the engine had crashed.

    vLLM ends with 0 either way, so whoever restarts servers by their exit code would leave it down;
    and it may wait for ever for streams whose engine is gone, with the clients waiting, too.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client, self._shutdown = engine_client, engine_client.shutdown
        self._died: bool | None = None
        engine_client.shutdown = self.shutdown
        atexit.register(self._at_exit)

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """The engine client's own, noting what was before."""
        if self._died is None:
            # Once it has been shut down, it counts as errored.
            self._died = bool(self._client.errored)
            drain = kwargs.get("timeout") or 0
            timer = threading.Timer(drain + _GRACE_SECONDS, self._end)
            timer.daemon = True
            timer.start()
        return self._shutdown(*args, **kwargs)

    def _at_exit(self) -> None:
        if self._died:
            self._end()

    def _end(self) -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(bool(self._died)))
