"""Runs the demo and commands on the installed package, for the nox session `wheel`."""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import chatdb
from chatdb.embedded.server import EmbeddedServer

SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello! 👋"}]},
    {"id": "b", "conversations": [{"from": "human", "value": str(n)} for n in range(120)]},
]


async def use(home: Path) -> None:
    async with chatdb.open_embedded(home) as db:
        await chatdb.check_schema(db)
        conversation = await chatdb.create_conversation(db, user_id="alice", key="k")
        await chatdb.append_message(
            db, user_id="alice", conversation_id=conversation.id, role="user", content="from the wheel"
        )
        history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
        assert [message.content for message in history] == ["from the wheel"]


with tempfile.TemporaryDirectory() as folder:
    home, file = Path(folder) / "home", Path(folder) / "sharegpt.json"
    package = Path(chatdb.__file__).parent
    assert (package / "sql" / "adopt").is_dir() and (package / "migrations").is_dir(), "the wheel lacks its SQL"
    file.write_text(json.dumps(SHAREGPT))
    asyncio.run(use(home))
    run = [str(Path(sys.executable).with_name("chatdb")), "demo", "--file", str(file)]
    said = subprocess.run(run, env={"CHATDB_HOME": str(home), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    print(said.stdout, said.stderr)
    assert said.returncode == 0, said.returncode
    assert "imported 2 conversations, 122 messages" in said.stdout
    assert "target met" in said.stdout
    server = EmbeddedServer(home)
    with server:
        env = {"DATABASE_URL": server.dsn, "PATH": "/usr/bin:/bin"}
        for command in ("rollback --to 0 --yes", "migrate", "check"):
            run = [str(Path(sys.executable).with_name("chatdb")), *command.split()]
            said = subprocess.run(run, env=env, capture_output=True, text=True)
            assert said.returncode == 0, (command, said.stderr)
print("the installed package works")
