"use strict";
const OUTSIDE = 255, LARGEST = 254, WIDTH = 720;
const TYPES = {uint8: Uint8Array, int8: Int8Array, int16: Int16Array, uint16: Uint16Array};
const REACHES = {
  "everything": "sees all tokens of the window",
  "column": "sees the levels and times of its own place alone, so the map shows every place's mean lag",
  "plane": "sees all places at its own level and time",
  "window": "sees places and times within a window",
  "shifted window": "sees places and times within a window, shifted by half of it",
};

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.bytes), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new TYPES[packed.type](await new Response(stream).arrayBuffer());
}

// Every array of the data in place of its text.
async function unpackAll(value) {
  if (value === null || typeof value !== "object") return value;
  if ("bytes" in value) return unpack(value);
  for (const key of Object.keys(value)) value[key] = await unpackAll(value[key]);
  return value;
}

function element(name, parent, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

const turn = (degrees) => ((degrees % 360) + 360) % 360;

// Where a place is on a map, as shares of its width and height; null outside of it.
function position(grid, latitude, longitude) {
  const x = turn(longitude - grid.west) / (grid.east - grid.west);
  const y = (grid.north - latitude) / (grid.north - grid.south);
  return x <= 1 && y >= 0 && y <= 1 ? [x, y] : null;
}

function drawMap(canvas, data, grid, colour, mark) {
  canvas.width = WIDTH;
  canvas.height = Math.round(WIDTH * (grid.north - grid.south) / (grid.east - grid.west));
  const small = new OffscreenCanvas(grid.columns, grid.rows), inner = small.getContext("2d");
  const picture = inner.createImageData(grid.columns, grid.rows);
  for (let row = 0; row < grid.rows; row++) {
    for (let column = 0; column < grid.columns; column++) {
      const at = 4 * ((grid.rows - 1 - row) * grid.columns + column);
      picture.data.set(colour(row * grid.columns + column), at);
      picture.data[at + 3] = 255;
    }
  }
  inner.putImageData(picture, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  drawCoasts(context, data, grid, canvas);
  const at = position(grid, ...mark);
  if (!at) return;
  for (const [width, ink] of [[5, "#fff"], [2.5, "#d00"]]) {
    context.strokeStyle = ink;
    context.lineWidth = width;
    context.beginPath();
    context.arc(at[0] * canvas.width, at[1] * canvas.height, 9, 0, 7);
    context.stroke();
  }
}

function drawCoasts(context, data, grid, canvas) {
  context.strokeStyle = "rgba(0,0,0,.75)";
  context.lineWidth = 1;
  context.beginPath();
  let first = 0;
  for (const length of data.coastLengths) {
    let before = null;
    for (let point = first; point < first + length; point++) {
      const [east, north] = [data.coast[2 * point] / 100, data.coast[2 * point + 1] / 100];
      const at = position(grid, north, east);
      if (at && before && Math.abs(at[0] - before[0]) < 0.5) {
        context.lineTo(at[0] * canvas.width, at[1] * canvas.height);
      } else if (at) {
        context.moveTo(at[0] * canvas.width, at[1] * canvas.height);
      }
      before = at;
    }
    first += length;
  }
  context.stroke();
}

// A colour bar between two numbers, with one in the middle.
function drawBar(parent, palette, low, middle, high) {
  parent.replaceChildren();
  element("span", parent, low);
  const canvas = element("canvas", parent);
  [canvas.width, canvas.height] = [255, 1];
  const picture = canvas.getContext("2d").createImageData(255, 1);
  for (let n = 0; n < 255; n++) picture.data.set([...palette.slice(3 * n, 3 * n + 3), 255], 4 * n);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  element("span", parent, high);
  if (middle) canvas.title = `in the middle: ${middle}`;
}

const ofPalette = (palette, number) =>
  number === OUTSIDE ? [225, 225, 225] : palette.subarray(3 * number, 3 * number + 3);
const rounded = (value) => Number(value.toPrecision(3)).toString();

function nearest(places, latitude, longitude) {
  const radians = Math.PI / 180;
  let best = 0, closest = -2;
  for (let n = 0; n < places.latitude.length; n++) {
    const cosine = Math.sin(latitude * radians) * Math.sin(places.latitude[n] * radians) +
      Math.cos(latitude * radians) * Math.cos(places.latitude[n] * radians) *
      Math.cos((longitude - places.longitude[n]) * radians);
    if (cosine > closest) [best, closest] = [n, cosine];
  }
  return best;
}

function placeName(places, number) {
  const [north, east] = [places.latitude[number], (turn(places.longitude[number] + 180)) - 180];
  const rest = `${Math.abs(north).toFixed(0)}° ${north < 0 ? "S" : "N"}, ` +
    `${Math.abs(east).toFixed(0)}° ${east < 0 ? "W" : "E"}`;
  const named = number - (places.latitude.length - places.names.length);
  return named >= 0 ? `${places.names[named]} (token at ${rest})` : `token at ${rest}`;
}

// The share of every level and time step in the attention of one head, as a table.
function timesTable(parent, pair, head, place) {
  const [levels, steps] = [pair.levels.length, pair.offsets.length];
  const table = element("table", element("div", parent));
  table.parentNode.className = "scroll";
  table.className = "times";
  const top = element("tr", element("thead", table));
  element("th", top, "level");
  for (const hours of pair.offsets) element("th", top, `${rounded(hours)} h`);
  const body = element("tbody", table), shares = head.times;
  const from = place * levels * steps;
  const high = Math.max(1, ...shares.subarray(from, from + levels * steps));
  pair.levels.forEach((name, level) => {
    const row = element("tr", body);
    element("th", row, name).scope = "row";
    for (let step = 0; step < steps; step++) {
      const share = shares[from + level * steps + step];
      const cell = element("td", row, `${(share / 100).toFixed(share < 995 ? 1 : 0)} %`);
      cell.style.background = `rgba(33, 102, 172, ${0.75 * share / high})`;
      if (share / high > 0.7) cell.style.color = "#fff";
    }
  });
}

function headCard(parent, data, pair, head, place, choose) {
  const card = element("figure", parent), caption = element("figcaption", card);
  element("b", caption, `head ${head.head + 1}`);
  const canvas = element("canvas", card), bar = element("div", card);
  bar.className = "bar";
  const mark = [data.places.latitude[place], data.places.longitude[place]];
  const palette = data.palettes.viridis;
  const isColumn = head.reach === "column";
  const grid = isColumn ? data.spread : pair;
  const from = place * grid.rows * grid.columns;
  const colour = (n) =>
    ofPalette(palette, isColumn ? head.values[grid.numbers[n]] : head.values[from + n]);
  drawMap(canvas, data, grid, colour, mark);
  canvas.addEventListener("click", (event) => choose(event, grid));
  if (isColumn) {
    caption.append(": mean lag of what is attended, in hours before the last time step");
    drawBar(bar, palette, "0 h", `${rounded(head.high / 2)} h`, `${rounded(head.high)} h`);
  } else {
    caption.append(": share of attention by place; a quarter of the largest is in the middle");
    const high = head.high[place];
    drawBar(bar, palette, "0 %", `${rounded(high / 4)} %`, `${rounded(high)} %`);
  }
  timesTable(card, pair, head, place);
}

async function start() {
  const data = await unpackAll(JSON.parse(document.getElementById("data").textContent));
  const find = (id) => document.getElementById(id);
  const {places, pairs} = data, count = places.latitude.length;
  let place = count - places.names.length;
  if (place === count) place = Math.floor(count / 2);

  function choose(event, grid) {
    const canvas = event.currentTarget;
    const latitude = grid.north - event.offsetY / canvas.clientHeight * (grid.north - grid.south);
    const longitude = grid.west + event.offsetX / canvas.clientWidth * (grid.east - grid.west);
    place = nearest(places, latitude, longitude);
    draw();
  }

  function drawBackground(mark) {
    const field = data.background, palette = data.palettes[field.palette];
    find("background-still")?.remove();
    drawMap(find("background"), data, field, (n) => ofPalette(palette, field.values[n]), mark);
    find("background-title").textContent = `${field.title} on the date of the maps`;
    const units = (value) => `${rounded(value)} ${field.units}`;
    drawBar(find("background-bar"), palette, units(field.low), "", units(field.high));
  }

  function drawCosines(mark) {
    const grid = data.cosines, palette = data.palettes.RdBu_r;
    find("cosines").replaceChildren();
    for (const [name, title] of [["latents", "latents as they are"], ["anomalies", "anomalies"]]) {
      const card = element("figure", find("cosines"));
      element("figcaption", card, `${title}: cosine with ${placeName(places, place)}`);
      const canvas = element("canvas", card), bar = element("div", card);
      bar.className = "bar";
      const from = place * grid.rows * grid.columns;
      const colour = (n) => ofPalette(palette, grid[name][from + n] + 127);
      drawMap(canvas, data, grid, colour, mark);
      canvas.addEventListener("click", (event) => choose(event, grid));
      drawBar(bar, palette, "-1", "0", "1");
    }
  }

  function drawHeads() {
    find("heads").replaceChildren();
    if (!pairs.length) return;
    const pair = pairs[Number(find("pair").value)], layer = Number(find("layer").value);
    const heads = pair.heads.filter((head) => head.layer === layer);
    const words = [...new Set(heads.map((head) => head.reach))].map((reach) => {
      const numbers = heads.filter((head) => head.reach === reach).map((head) => head.head + 1);
      const some = numbers.length === 1 ? `Head ${numbers}` :
        `Heads ${numbers[0]} to ${numbers[numbers.length - 1]}`;
      return `${some}${numbers.length > 1 ? ": each" : ""} ${REACHES[reach]}.`;
    });
    const cut = heads.some((head) => head.reach !== "column" && head.values.includes(OUTSIDE));
    find("reach").textContent = words.join(" ") + (cut ? " Grey is outside of the window." : "");
    for (const head of heads) headCard(find("heads"), data, pair, head, place, choose);
  }

  function draw() {
    const mark = [places.latitude[place], places.longitude[place]];
    const list = find("place");
    list.replaceChildren();
    const numbers = places.names.map((_, n) => count - places.names.length + n);
    if (!numbers.includes(place)) numbers.unshift(place);
    for (const number of numbers) {
      const option = element("option", list, placeName(places, number));
      option.value = number;
      option.selected = number === place;
    }
    drawBackground(mark);
    drawHeads();
    drawCosines(mark);
  }

  pairs.forEach((pair, number) => {
    const text = pair.stream === pair.other ? `${pair.stream} sees itself` :
      `${pair.stream} sees ${pair.other}`;
    element("option", find("pair"), text).value = number;
  });
  const layers = [...new Set(pairs.flatMap((pair) => pair.heads.map((head) => head.layer)))];
  for (const layer of layers) element("option", find("layer"), `${layer}`).value = layer;
  find("pair-label").hidden = pairs.length < 2;
  find("layer-label").hidden = layers.length < 2;
  find("background").addEventListener("click", (event) => choose(event, data.background));
  find("place").addEventListener("change", (event) => {
    place = Number(event.target.value);
    draw();
  });
  for (const id of ["pair", "layer"]) find(id).addEventListener("change", drawHeads);
  draw();
}

start();
