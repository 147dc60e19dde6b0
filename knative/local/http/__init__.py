"""An HTTP/1.1 server and client for streaming proxies: heads are bytes, bodies are passed on as they arrive.

May import: eventing.http.
"""
