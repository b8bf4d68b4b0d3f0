"""Images over HTTP in the shape of the OpenAI images API (docs/serving.md).

Needs the extra `varptq[api]`. `varptq.web.api.server.serve` starts it; no page is imported here.
"""
