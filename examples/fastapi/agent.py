"""The agent: one tool, and a toy model that needs no network. OPENAI_MODEL selects a real model instead."""

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import agents
from agents.items import TResponseStreamEvent
from openai.types.responses import ResponseCompletedEvent, ResponseTextDeltaEvent

DELAY = float(os.environ.get("TOY_DELAY", "0.05"))  # seconds for each word of the toy model
HELP = "I can roll dice: ask me to roll a die with 20 sides. I can write a long story, so that you can stop me. \
Everything else I repeat, because I am only a toy."
DAY = "On day {} a clerk came with {} new rows, and at night the small table counted them all, as it did every night."
STORY = " ".join(DAY.format(day, day * 7) for day in range(1, 11))


@agents.function_tool
def roll_dice(sides: int) -> int:
    """Roll a die and return the number on top."""
    return random.randint(1, sides)


class ToyModel(agents.Model):
    """Rolls dice, tells a story or repeats the question, one word after the other."""

    async def get_response(self, *_args: Any, **_options: Any) -> agents.ModelResponse:
        """Fail: this service only streams."""
        raise NotImplementedError

    async def stream_response(self, *args: Any, **_options: Any) -> AsyncIterator[TResponseStreamEvent]:
        """Yield the words of an answer to the last item, or call the tool."""
        last = args[1][-1]
        question = str(last.get("content"))
        if re.search(r"\broll|\bdi[ec]e?\b", question, re.IGNORECASE):
            sides = re.search("[1-9][0-9]{0,3}", question)
            arguments = f'{{"sides": {sides[0] if sides else 6}}}'
            yield completed({"type": "function_call", "call_id": "toy", "name": "roll_dice", "arguments": arguments})
            return
        text = f"You wrote: {question[:500]}"
        if "output" in last:
            text = f"You rolled a {last['output']}."
        elif "story" in question.lower():
            text = STORY
        elif "can you do" in question.lower():
            text = HELP
        for word in re.findall(r"\s*\S+", text):
            await asyncio.sleep(DELAY)
            event: Any = {"delta": word, "item_id": "toy", "content_index": 0, "output_index": 0, "logprobs": []}
            event |= {"type": "response.output_text.delta", "sequence_number": 0}
            yield ResponseTextDeltaEvent.model_validate(event)
        message: dict[str, Any] = {"type": "message", "id": "toy", "role": "assistant", "status": "completed"}
        yield completed(message | {"content": [{"type": "output_text", "text": text, "annotations": []}]})


def completed(item: dict[str, Any]) -> TResponseStreamEvent:
    """Return the event that ends a model's response."""
    response = {"id": "toy", "object": "response", "created_at": 0, "model": "toy", "output": [item]}
    response |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}
    event = {"type": "response.completed", "sequence_number": 0, "response": response}
    return ResponseCompletedEvent.model_validate(event)


agents.set_tracing_disabled(True)
MODEL = os.environ.get("OPENAI_MODEL") or ToyModel()
AGENT = agents.Agent[None]("Assistant", instructions="Answer briefly.", tools=[roll_dice], model=MODEL)
