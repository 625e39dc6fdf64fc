"""Tools of an MCP server (Model Context Protocol, https://modelcontextprotocol.io), over its standard input and output.

class Files(MCPTools):
    command = ("python", "file_server.py")
"""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

from mcp import Client, StdioServerParameters

from coati.errors import UserError

GUARD = Path(__file__).with_name("mcp_guard.py")
LONGEST_MESSAGE = 4 << 20  # bytes; a server that writes a longer one is ended


class MCPTools:
    """A row has `question`, and what the policy says in the end is for the run's rewards to score. Every episode has a
    server process of its own.

    Attributes:
        command: starts the server; set by a subclass.
    """

    command: ClassVar[tuple[str, ...]]

    @classmethod
    def server(cls) -> StdioServerParameters:
        if shutil.which(cls.command[0]) is None:
            raise FileNotFoundError(f"no program {cls.command[0]}")
        guard = ["-S", "-E", str(GUARD), str(LONGEST_MESSAGE)]
        return StdioServerParameters(command=sys.executable, args=[*guard, *cls.command])

    @classmethod
    def tools(cls) -> list[dict[str, Any]]:
        """The server's tools as chat templates take them.

        Raises:
            UserError: the server doesn't start, or doesn't answer.
        """

        async def ask():
            async with Client(cls.server()) as client:
                return (await client.list_tools()).tools

        try:
            found = asyncio.run(ask())
        except Exception as error:
            raise UserError(f"the MCP server {' '.join(cls.command)!r} lists no tools: {error!r}") from None
        described = [
            {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            for tool in found
        ]
        return [{"type": "function", "function": function} for function in described]

    async def reset(self, row: dict[str, Any]) -> str:
        opened: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self.closing = asyncio.Event()
        self.serving = asyncio.create_task(self.serve(opened))
        self.client = await opened
        return row["question"]

    async def serve(self, opened: "asyncio.Future[Client]"):
        """Keeps the connection open. It has to be closed by the task that has opened it."""
        try:
            async with Client(self.server()) as client:
                opened.set_result(client)
                await self.closing.wait()
        except Exception as error:
            if not opened.done():
                opened.set_exception(error)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What a tool returns, its texts.

        Raises:
            RuntimeError: the tool says that it has failed.
        """
        result = await self.client.call_tool(name, arguments)
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise RuntimeError(text)
        return text

    async def close(self):
        if hasattr(self, "serving"):
            self.closing.set()
            await self.serving
