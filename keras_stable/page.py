"""One HTML page out of data, which may be of strangers: nothing in it runs.

The data travel as JSON in a `<script type="application/json">`, where no
character of them can end the element; `assets/page.js` puts them into the
page as text, never as HTML. A content security policy allows the page's own
scripts, named by their hashes, and no request to any network.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math

SCRIPTS = ("values.js", "figures.js", "page.js")
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)


def json_for_html(value):
    r"""JSON that stays JSON within a script element.

    Numbers that JSON does not have become null.

    >>> json_for_html({"label": "</script>", "loss": math.nan})
    '{"label":"\\u003c/script\\u003e","loss":null}'
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    # Escapes of JSON's own: `</script>` and `<!--` cannot occur.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _asset(name):
    folder = importlib.resources.files("keras_stable") / "assets"
    return (folder / name).read_text("utf-8")


def plotly_source():
    """Plotly's JavaScript, out of its Python package.

    Raises:
        ImportError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "A report is drawn by Plotly, which is not installed: "
            "pip install 'keras-stable[lab]', or write the tables alone with "
            "format='markdown'."
        ) from error
    return get_plotlyjs()


def render(data, title):
    """The page.

    Args:
        data: dictionary of JSON values, as `report` makes it.
        title: string.

    Returns:
        String of HTML, which needs no other file.
    """
    # A module's or worker's end tag within Plotly's strings would end ours.
    plotly = plotly_source().replace("</script", "<\\/script")
    scripts = [plotly, "".join(map(_asset, SCRIPTS))]
    hashes = [
        base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        for code in scripts
    ]
    policy = POLICY.format(scripts=" ".join(f"'sha256-{h}'" for h in hashes))
    plotly, code = (f"<script>{code}</script>" for code in scripts)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" '
            'content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>",
            _asset("page.html"),
            '<script id="data" type="application/json">'
            f"{json_for_html(data)}</script>",
            plotly,
            code,
            "</body>\n</html>\n",
        ]
    )
