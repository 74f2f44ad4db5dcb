"""``GET /sleb/manifest`` and the manifest's metrics, in vLLM's own API server.

vLLM loads an endpoint plugin only where ``VLLM_PLUGINS`` names it, as `sleb-serve serve` does.
"""

from __future__ import annotations

from typing import Any

from vllm import envs

from sleb_serve.manifest.built import check_ranks, publish
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.shown import shown, shown_name
from sleb_serve.protocol import ENTRY_POINT, MANIFEST_PATH
from sleb_serve.utils.bearer import authorized
from sleb_serve.utils.ending import Ending
from sleb_vllm.verify import REPORT

_JSON = "application/json"
_UNAUTHORIZED = b'{"error":"Unauthorized"}'
_DENSE = b'{"error":"this server serves a model with all of its blocks"}'


class ManifestEndpoint:
    """vLLM's endpoint plugin: what is served, from the ranks themselves."""

    name = ENTRY_POINT
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the route."""
        from fastapi import Request, Response

        async def manifest(request: Request) -> Response:
            state = request.app.state
            # vLLM guards paths of its own only.
            if not authorized(request.headers.get("Authorization"), state.sleb_keys):
                return Response(_UNAUTHORIZED, 401, media_type=_JSON)
            if state.sleb is None:
                return Response(_DENSE, 404, media_type=_JSON)
            return Response(state.sleb, media_type=_JSON)

        # FastAPI reads the annotations, which are text here.
        manifest.__annotations__ = {"request": Request, "return": Response}
        app.add_api_route(MANIFEST_PATH, manifest, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Ask every rank, refuse to serve if they differ from the manifest, and publish.

        Raises:
            SlebError: see `check_ranks`; the server does not start.
        """
        state.sleb = None
        state.sleb_keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        if engine_client is None:
            return
        model_config = engine_client.vllm_config.model_config
        pruning = Pruning.of_config(model_config.hf_config)
        if pruning is None:
            return
        Ending(engine_client)
        reports = await engine_client.collective_rpc(REPORT)
        check_ranks(pruning, reports)
        names = [shown_name(name) for name in args.served_model_name or [args.model]]
        state.sleb = shown(pruning, names, reports)
        publish(pruning, names[0], reports)
