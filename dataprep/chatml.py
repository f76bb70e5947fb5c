"""Which chat template does a tokenizer that is made here carry? ChatML, with tools and reasoning."""

# What a tool sees and how it is called are spelled as Hermes models have it, JSON between tags.
CHATML = """\
{%- if tools %}
    {%- set first = messages[0] if messages and messages[0].role == "system" else none %}
    {{- "<|im_start|>system\\n" }}
    {{- first.content + "\\n\\n" if first else "" }}
    {{- "You may call these functions, each given by its JSON schema:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\nTo call one, write <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\\n" }}
        {{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" if message.reasoning_content else "" }}
        {{- "<tool_response>\\n" if message.role == "tool" else "" }}
        {{- message.content }}
        {{- "\\n</tool_response>" if message.role == "tool" else "" }}
        {%- for call in message.tool_calls or [] %}
            {{- "\\n" if message.content or not loop.first else "" }}
            {{- '<tool_call>{"name": ' + (call.function.name | tojson) }}
            {{- ', "arguments": ' + (call.function.arguments | tojson) + "}</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
