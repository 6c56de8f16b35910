"""Text from any `interfaces.Decoder`, and states that outlive a program.

`generate` reads prompts and writes text in constant memory, `sampling` chooses
tokens, `sessions` saves, loads and moves the state of a text.
"""
