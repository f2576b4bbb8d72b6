"""The bodies of requests, in the form of OpenAI's API and with this project's own fields.

An unknown field is an error, because a setting that is silently dropped changes what an application gets. Fields that
cannot change an answer here, such as `user`, are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Strength = Annotated[float, Field(allow_inf_nan=False)]
Json = dict[str, Any]


class Body(BaseModel):
    """A body that has no unknown fields and no values of a wrong type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream contains."""

    include_usage: bool = Field(False, description="send the numbers of tokens in a last chunk")
    include_obfuscation: bool | None = Field(None, description="accepted and ignored")


class Sampled(Body):
    """The fields that chat completions and completions share."""

    model: str = Field(description="the model's name, or patches: `pirate`, `pirate@0.5`, `pirate+french`")
    patch: str | dict[str, Strength] | None = Field(
        None, description="the patch beside `model`: a name, or strengths by name; null takes what `model` names"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=64)
    stop: str | list[str] | None = Field(None, description="null takes the stop strings of the patch")
    seed: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100, description="null takes the model's own setting")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: int | None = Field(None, ge=0)
    regex: str | None = Field(None, description="the whole answer matches this regular expression")
    grammar: str | None = Field(None, description="the answer follows this Lark grammar (llguidance)")
    user: str | None = Field(None, description="accepted and ignored")


class JsonSchema(Body):
    """A named JSON schema."""

    name: str = Field("answer", description="accepted and ignored")
    description: str | None = Field(None, description="accepted and ignored")
    json_schema: Json = Field(alias="schema", default_factory=dict)
    strict: bool | None = Field(None, description="accepted; the schema is always kept to")


class TextFormat(Body):
    """An answer in any form."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """An answer that a JSON schema accepts."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatBody(Sampled):
    """The body of a chat completion."""

    messages: list[Json] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = Field(None, description="accepted and ignored")
    documents: list[Json] | None = None
    chat_template_kwargs: Json | None = Field(None, description="further variables of the chat template")
    metadata: Json | None = Field(None, description="accepted and ignored")
    store: bool | None = Field(None, description="accepted and ignored: nothing is stored")
    service_tier: str | None = Field(None, description="accepted and ignored")


class CompletionBody(Sampled):
    """The body of a completion."""

    prompt: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="the text to continue, as it is; several texts get an answer each"
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = Field(False, description="send the prompt in front of the answer")


class PatchBody(Body):
    """The body that loads a patch."""

    name: str = Field(min_length=1, max_length=200)
    file: str = Field(min_length=1, description="a file of the server's --patch-dir, without its folder")
