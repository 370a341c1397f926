"""A dialog to the ids of its prompt, in the two chat formats of Llama. Knows nothing of tensors or models."""

from collections.abc import Mapping
from typing import Literal, TypedDict, get_args

from llama.tokenizer.chat_template import ChatTemplate
from llama.tokenizer.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "ipython", "tool"]  # `tool` is another name of `ipython`


class Message(TypedDict):
    role: Role
    content: str


Dialog = list[Message]

# A template counts as the built-in format if both give the same ids for all of these dialogs.
_USER, _MORE = {"role": "user", "content": " Hi there!\n"}, {"role": "user", "content": "And <|eot_id|> then?"}
_ANSWER, _SYSTEM = {"role": "assistant", "content": "Hello. "}, {"role": "system", "content": "Be brief."}
PROBES = [[_USER], [_SYSTEM, _USER], [_USER, _ANSWER, _MORE], [_SYSTEM, _USER, _ANSWER, _MORE, _ANSWER, _USER]]


class ChatFormat:
    """Turns a dialog into the ids of its prompt, in the format that the tokenizer's models were tuned on.

    Llama 3: each message is `<|start_header_id|>ROLE<|end_header_id|>`, two newlines, the content and `<|eot_id|>`.
    Llama 2: `[INST] <<SYS>>`, where the tags are text. A user can write them too: they are not refused, and the model
    cannot tell them from the format's own. In neither format does a message ever become a control token (`<s>`,
    `</s>`, `<|eot_id|>`, …). White space around a content is stripped.

    A `chat_template` of the tokenizer that renders dialogs differently is used instead.

    Formats: the model cards of Llama 3.1 and Llama 2, llama.com/docs/model-cards-and-prompt-formats.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._is_built_in: bool | None = None  # whether the template renders as this class does; None: not tried yet

    def encode_header(self, message: Message) -> list[int]:
        """Ids of a message's header. The role `tool` becomes `ipython`, its name in the format.

        Raises ValueError as `check_messages` does, and if the format is Llama 2's, which has no headers.
        """
        self.check_messages([message])
        if self.tokenizer.kind == "llama2":
            raise ValueError("the Llama 2 chat format has no header or message by itself: use encode_dialog_prompt")
        special = self.tokenizer.special_tokens
        if missing := {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} - special.keys():
            raise ValueError(f"the tokenizer has no {', '.join(sorted(missing))}: its model was not made for dialogs")
        name = self.tokenizer.encode("ipython" if message["role"] == "tool" else message["role"])
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *self.tokenizer.encode("\n\n")]

    def encode_message(self, message: Message) -> list[int]:
        """Ids of one whole message: header, content, end of turn. Raises as `encode_header` does."""
        header = self.encode_header(message)
        return header + self.tokenizer.encode(message["content"].strip()) + [self.tokenizer.eot_id]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of a dialog, up to where the assistant's answer begins. Raises ValueError as `check` does."""
        self.check(dialog)
        if self.tokenizer.chat_template is None or self.template is None:
            return self._built_in_prompt(dialog)
        return self.template.ids(dialog, self.tokenizer)

    def encode_answered(self, dialog: Dialog, answer: str) -> list[int]:
        """Ids of a dialog with its answer, up to the end of the answer's turn. Raises as `encode_dialog_prompt`."""
        self.check(dialog)
        if self.template is not None:
            whole = [*dialog, {"role": "assistant", "content": answer}]
            return self.template.ids(whole, self.tokenizer, add_generation_prompt=False)
        end = self.tokenizer.eos_id if self.tokenizer.kind == "llama2" else self.tokenizer.eot_id
        return [*self._built_in_prompt(dialog), *self.tokenizer.encode(answer.strip()), end]

    @property
    def template(self) -> ChatTemplate | None:
        """The tokenizer's chat template, if it renders dialogs differently from the built-in format.

        Raises ImportError if Jinja is not installed, ValueError if the template is broken.
        """
        found = self.tokenizer.chat_template
        if found is not None and self._is_built_in is None:
            self._is_built_in = all(map(self._renders_alike, PROBES))
        return None if self._is_built_in else found

    def _renders_alike(self, dialog: Dialog) -> bool:
        ids = []
        for render in (self._built_in_prompt, lambda dialog: self.tokenizer.chat_template.ids(dialog, self.tokenizer)):
            try:
                ids.append(render(dialog))
            except ValueError as error:
                if "refuses the dialog" not in str(error) and render != self._built_in_prompt:
                    raise
                ids.append(None)
        return ids[0] == ids[1]

    def _built_in_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of a dialog, up to where the assistant's answer begins."""
        if self.tokenizer.kind == "llama2":
            return self._llama2_prompt(dialog)
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant", "content": ""})

    def check(self, dialog: Dialog) -> None:
        """Checks that a dialog can be a prompt.

        Raises ValueError as `check_messages` does. Llama 2: also if user and assistant do not alternate after an
        optional system message, or if the last message is not the user's.
        """
        self.check_messages(dialog)
        if self.tokenizer.kind == "llama2" and self.template is None:
            roles = [message["role"] for message in dialog]
            turns = roles[1:] if roles[0] == "system" else roles
            if any(role != ("user", "assistant")[k % 2] for k, role in enumerate(turns)):
                expected = "a Llama 2 dialog has user and assistant in turn, after at most one system message"
                raise ValueError(f"{expected}; found {', '.join(roles)}")
            if roles[-1] != "user":
                raise ValueError(f"a Llama 2 dialog ends with a message of the user, not of {roles[-1]!r}")

    @staticmethod
    def check_messages(dialog: Dialog) -> None:
        """Checks what every format requires of a dialog, whatever the order of the roles.

        Raises ValueError if it is not a list of at least one message, or if a message has no `role` or no `content`, an
        unknown role or a content that is not a str.
        """
        if not (isinstance(dialog, list | tuple) and dialog):
            found = "an empty list" if dialog == [] else type(dialog).__name__
            hint = " (for a single dialog, pass [dialog])" if isinstance(dialog, Mapping) else ""
            expected = "a dialog is a list of one or more messages, the last of them the user's"
            raise ValueError(f"{expected}; found {found}{hint}")
        roles = get_args(Role)
        for number, message in enumerate(dialog):
            if not isinstance(message, Mapping):
                problem = f"is a {type(message).__name__}, expected a dict with 'role' and 'content'"
            elif "role" not in message or "content" not in message:
                missing = "content" if "role" in message else "role"
                problem = f"has no {missing!r}; found the keys {sorted(map(str, message))}"
            elif message["role"] not in roles:
                problem = f"has the unknown role {message['role']!r}; expected one of {', '.join(roles)}"
            elif not isinstance(message["content"], str):
                problem = f"has a content of type {type(message['content']).__name__}, expected a str"
            else:
                continue
            raise ValueError(f"message {number} of the dialog {problem}")

    def _llama2_prompt(self, dialog: Dialog) -> list[int]:
        contents = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            contents[:2] = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"]
        *earlier, last = (content.strip() for content in contents)
        ids = []
        for user, assistant in zip(earlier[::2], earlier[1::2], strict=True):
            ids += self.tokenizer.encode(f"[INST] {user} [/INST] {assistant} ", bos=True, eos=True)
        return ids + self.tokenizer.encode(f"[INST] {last} [/INST]", bos=True)
