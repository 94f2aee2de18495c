"""Self-contained HTML pages: elements, charts and one style; no script, nothing that is loaded from elsewhere."""
