"""Asks for vectors as programs do that use LangChain and LlamaIndex. Runs in the clients' environment and prints JSON."""

import json
import os
import sys

TEXTS = json.loads(sys.argv[1])
URL = f"{os.environ['LAMINA_URL']}/v1"


def by_langchain() -> dict[str, object]:
    from langchain_openai import OpenAIEmbeddings

    # Its default sends token ids of OpenAI's own tokenizer.
    embeddings = OpenAIEmbeddings(model="tiny", base_url=URL, api_key="none", check_embedding_ctx_length=False)
    return {"documents": embeddings.embed_documents(TEXTS), "query": embeddings.embed_query(TEXTS[0])}


def by_llama_index() -> dict[str, object]:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embeddings = OpenAILikeEmbedding(model_name="tiny", api_base=URL, api_key="none", embed_batch_size=2)
    return {"documents": embeddings.get_text_embedding_batch(TEXTS), "query": embeddings.get_query_embedding(TEXTS[0])}


print(json.dumps({"langchain": by_langchain(), "llama-index": by_llama_index()}))
