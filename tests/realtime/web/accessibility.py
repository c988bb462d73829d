"""What keeps people from using a page, by axe-core."""

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
CAPTIONS = "video-caption"  # what is recorded has no sound


def found_by_axe(page):
    """Rule, place and messages of all that axe-core finds in an open page of Playwright."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page, options=RULES).response["violations"]
    return [
        (each["id"], node["target"], [check["message"] for check in node["any"]])
        for each in violations
        for node in each["nodes"]
        if each["id"] != CAPTIONS
    ]
