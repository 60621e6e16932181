"""An HTTP server for chats, editors and agents: OpenAI's and Anthropic's requests, and a page."""
