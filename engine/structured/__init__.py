"""Keep a text to a form: grammars are compiled, and say which tokens may come next. Knows no request and no tensor."""
