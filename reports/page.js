(() => {
  "use strict";
  const root = document.documentElement;
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = [...document.querySelectorAll("script[data-chart]")].map((script) => ({
    element: document.getElementById(script.dataset.chart),
    spec: JSON.parse(script.textContent),
  }));
  const theme = () => root.dataset.theme || (prefersDark.matches ? "dark" : "light");

  // Colors are names ("theme:ink") everywhere but in the data, which is left alone.
  const paint = (value, palette) => {
    if (typeof value === "string") {
      return value.startsWith("theme:") ? palette[value.slice(6)] : value;
    }
    if (Array.isArray(value)) return value.map((item) => paint(item, palette));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [
        key,
        key === "datasets" || key === "data" ? item : paint(item, palette),
      ]),
    );
  };

  let drawing = Promise.resolve();
  const draw = async () => {
    const name = theme();
    let ready = 0;
    for (const { element, spec } of charts) {
      // ast: no eval, so that the page's content security policy can forbid it.
      const options = {
        mode: "vega-lite",
        renderer: "svg",
        ast: true,
        tooltip: { theme: name, maxDepth: 2 },
        actions: { export: true, editor: false, source: false, compiled: false },
        downloadFileName: element.id,
      };
      try {
        await vegaEmbed(element, paint(spec, themes[name]), options);
        element.dataset.drawn = name;
        ready += 1;
      } catch (error) {
        element.textContent = `This chart could not be drawn: ${error.message}`;
      }
    }
    root.dataset.ready = String(ready);
  };
  const redraw = () => (drawing = drawing.then(draw));

  const button = document.getElementById("theme");
  const label = () => { button.textContent = theme() === "dark" ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    label();
    redraw();
  });
  prefersDark.addEventListener("change", () => { label(); redraw(); });
  label();
  redraw();
})();
