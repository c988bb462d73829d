// Two small charts on canvas: stacked areas and lines over the last minutes. No library: they draw a few hundred points a second.

export const STAGE_COLOURS = {
  read: "#5b8fc7", wait: "#8b94a1", prepare: "#5fb3ab", engine: "#ef5b5b", draw: "#f2a541", write: "#a08cd0",
};
export const LINE_COLOURS = ["#f6a13c", "#5b9ee0", "#5fc49a", "#ef6f6f", "#b49be6", "#d8c24a", "#5fc0d0", "#e08ab8"];
const WINDOW_S = 120, LEFT = 40, BOTTOM = 20, TOP = 8, RIGHT = 6;

// Draws `series` ([{name, colour, values}], one value per time, null where there is none) over `times_s`, the last being now.
export function drawChart(canvas, times_s, series, { stacked }) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const layers = stacked ? stack(series) : series.map(({ values }) => values);
  const top = niceTop(Math.max(...layers.flat().filter((value) => value !== null), 0));
  const now_s = times_s.at(-1) ?? 0, span_s = Math.min(WINDOW_S, Math.max(20, now_s - (times_s[0] ?? 0)));
  const x = (time_s) => width - RIGHT - ((now_s - time_s) / span_s) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - (value / top) * (height - BOTTOM - TOP);
  drawAxes(pen, { width, height, top, span_s, y, style });
  if (times_s.length < 2) return;
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, 0, width - LEFT, height - BOTTOM + 1);
  pen.clip();
  for (let index = layers.length - 1; index >= 0; index--) {
    if (stacked) fillTo(pen, times_s, layers[index], index ? layers[index - 1] : null, series[index].colour, x, y);
    else strokeLine(pen, times_s, layers[index], series[index].colour, x, y);
  }
  pen.restore();
}

function stack(series) {
  const sums = [];
  for (const { values } of series) {
    const below = sums.at(-1);
    sums.push(values.map((value, i) => (value ?? 0) + (below ? below[i] : 0)));
  }
  return sums;
}

function niceTop(largest) {
  if (largest <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(largest * 1.1));
  return [1, 2, 3, 5, 8, 10].find((step) => step * power >= largest * 1.1) * power;
}

function drawAxes(pen, { width, height, top, span_s, y, style }) {
  pen.font = `11.5px ${getComputedStyle(document.body).fontFamily}`;
  pen.fillStyle = style.getPropertyValue("--quiet");
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (let line = 0; line <= 4; line++) {
    const value = (top * line) / 4, at = Math.round(y(value)) + 0.5;
    pen.beginPath();
    pen.moveTo(LEFT, at);
    pen.lineTo(width - RIGHT, at);
    pen.stroke();
    if (line % 2 === 0) pen.fillText(String(+value.toPrecision(3)), LEFT - 7, at);
  }
  pen.textBaseline = "alphabetic";
  pen.textAlign = "left";
  pen.fillText(`${Math.round(span_s)} s ago`, LEFT, height - 4);
  pen.textAlign = "right";
  pen.fillText("now", width - RIGHT, height - 4);
}

function fillTo(pen, times_s, upper, lower, colour, x, y) {
  pen.beginPath();
  upper.forEach((value, i) => pen.lineTo(x(times_s[i]), y(value)));
  for (let i = times_s.length - 1; i >= 0; i--) pen.lineTo(x(times_s[i]), y(lower ? lower[i] : 0));
  pen.closePath();
  pen.fillStyle = colour;
  pen.fill();
}

function strokeLine(pen, times_s, values, colour, x, y) {
  pen.beginPath();
  let drawing = false;
  values.forEach((value, i) => {
    if (value === null) drawing = false;
    else if (drawing) pen.lineTo(x(times_s[i]), y(value));
    else { pen.moveTo(x(times_s[i]), y(value)); drawing = true; }
  });
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  pen.stroke();
}
