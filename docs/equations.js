// Draws each equation that arithmatex marked, `\(...\)` or `\[...\]`, with KaTeX.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const displayMode = element.textContent.startsWith("\\[")
    katex.render(element.textContent.slice(2, -2), element, { displayMode, throwOnError: false })
  }
})
