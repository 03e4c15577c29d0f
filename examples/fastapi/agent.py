"""The agent: one tool, and a toy model that runs without a network. OPENAI_MODEL selects a real model instead."""

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import agents
from agents.items import TResponseStreamEvent
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
)

TOY_DELAY = float(os.environ.get("TOY_DELAY", "0.05"))
STORY = "Once upon a time, a small table dreamed of rows that nobody would ever lose. " * 14


@agents.function_tool
def roll_dice(sides: int) -> int:
    """Roll a die and return the number on top."""
    return random.randint(1, sides)


class ToyModel(agents.Model):
    """Rolls a die, tells a long story, or repeats the question, one word after the other."""

    async def get_response(self, *_args: Any, **_options: Any) -> agents.ModelResponse:
        """Fail: this service only streams."""
        raise NotImplementedError

    async def stream_response(
        self, _instructions: str | None, input: str | list[agents.TResponseInputItem], *_args: Any, **_options: Any
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Yield the words of the answer, and the whole answer at the end."""
        last: Any = input if isinstance(input, str) else input[-1]
        question = str(last.get("content", ""))
        if "output" in last:
            text = f"You rolled a {last['output']}."
        elif re.search(r"\b(roll|dice|die)\b", question, re.IGNORECASE):
            sides = re.search(r"[1-9]\d{0,3}", question)
            arguments = f'{{"sides": {sides[0] if sides else 6}}}'
            call = ResponseFunctionToolCall(
                type="function_call", call_id=f"call-{random.getrandbits(64):x}", name="roll_dice", arguments=arguments
            )
            yield completed(call)
            return
        elif "story" in question.lower():
            text = STORY.strip()
        else:
            text = f"You wrote: {question[:500]} I am only a toy. Ask me to roll a die, or to write a long story."
        for word in re.findall(r"\s*\S+", text):
            await asyncio.sleep(TOY_DELAY)
            yield ResponseTextDeltaEvent(
                type="response.output_text.delta", delta=word, item_id="toy", content_index=0, output_index=0,
                sequence_number=0, logprobs=[],
            )  # fmt: skip
        part = ResponseOutputText(type="output_text", text=text, annotations=[])
        yield completed(
            ResponseOutputMessage(id="toy", type="message", role="assistant", status="completed", content=[part])
        )


def completed(item: ResponseFunctionToolCall | ResponseOutputMessage) -> ResponseCompletedEvent:
    """Return the event that ends a model's response."""
    response = Response(
        id="toy", object="response", created_at=0, model="toy", output=[item], tools=[], tool_choice="auto",
        parallel_tool_calls=False,
    )  # fmt: skip
    return ResponseCompletedEvent(type="response.completed", response=response, sequence_number=0)


agents.set_tracing_disabled(True)
AGENT = agents.Agent[None](
    "Assistant",
    instructions="Answer briefly. Roll dice only with the tool.",
    tools=[roll_dice],
    model=os.environ.get("OPENAI_MODEL") or ToyModel(),
)
