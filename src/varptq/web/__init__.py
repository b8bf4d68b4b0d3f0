"""The studio in the browser: generate, edit, quantize and read reports (docs/studio.md).

Needs the extra `varptq[web]`. `varptq.web.server.serve` starts it; no module here is imported by
the rest of the library.
"""
