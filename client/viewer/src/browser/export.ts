import pictureStyle from '../../styles/picture.css'
import { choice, element } from '../presentation/elements'
import { resolvedColour } from './shell'
import { lines } from './streams'

// Exports: the recorded messages, and figures of the pictures with their titles and style.

/** What a view exports. */
export interface Exported {
  /** Title of the page, for file names. */
  title: string
  /** The stream whose lines are exported as JSON. */
  stream: string
  /** Lays the pictures out for this width in pixels; undefined = the window's. */
  layout: (width: number | undefined) => void
  /** Lines below the pictures. */
  footnotes?: () => readonly string[]
}

/** A size of figures. In those for papers, tokens and numbers of 11.5 px are 6 pt high. */
interface Size {
  name: string
  /** Width for which the pictures are laid out, in pixels; undefined = as on the screen. */
  layout: number | undefined
  /** Width of the figure with its unit; undefined = its pixels. */
  millimetres: number | undefined
  /** Whether the figure has the shape of a slide. */
  slide: boolean
}

const ON_SCREEN: Size = {
  name: 'as on the screen',
  layout: undefined,
  millimetres: undefined,
  slide: false,
}

const SIZES: Record<string, Size> = {
  screen: ON_SCREEN,
  column: { name: '85 mm, one column', layout: 450, millimetres: 85, slide: false },
  page: { name: '170 mm, two columns', layout: 912, millimetres: 170, slide: false },
  slide: { name: 'slide, 16:9', layout: 1180, millimetres: 338.67, slide: true },
}
const SLIDE_LAYOUTS = [1180, 912] // px; the one with the largest text is taken

/** A picture of the page and its name. */
interface Panel {
  name: string
  picture: SVGSVGElement
}

/** The dialog that exports panels of a view; returns a function that opens it. */
export function exportDialog(exported: Exported): () => void {
  const panels = element('fieldset', { class: 'export-panels' })
  const sizes = choice(
    'Size',
    Object.entries(SIZES).map(([value, { name }]) => [value, name] as const),
    () => {},
  )
  const formats = Object.entries(FORMATS).map(([name, save]) => {
    const made = element('button', { type: 'button', class: 'button' }, name)
    made.addEventListener('click', () => {
      dialog.close()
      void save(exported, chosenPanels(panels), SIZES[sizes.value] ?? ON_SCREEN)
    })
    return made
  })
  const close = element('button', { type: 'button', class: 'button' }, 'Close')
  const dialog = element(
    'dialog',
    { class: 'help export-dialog', 'aria-labelledby': 'export-title' },
    element('h2', { id: 'export-title' }, 'Export'),
    panels,
    element('label', { class: 'export-size' }, 'Size ', sizes),
    element('p', { class: 'quiet' }, 'PDF opens the print dialog; choose “Save as PDF” there.'),
    element('div', { class: 'export-formats' }, ...formats, close),
  )
  close.addEventListener('click', () => dialog.close())
  document.body.append(dialog)
  return () => {
    listPanels(panels)
    dialog.showModal()
  }
}

function listPanels(fieldset: HTMLFieldSetElement): void {
  const rows = visiblePanels().map(({ name }) => {
    const box = element('input', { type: 'checkbox', checked: '' })
    return element('label', {}, box, ` ${name}`)
  })
  fieldset.replaceChildren(element('legend', {}, 'Panels'), ...rows)
}

function chosenPanels(fieldset: HTMLFieldSetElement): Panel[] {
  const boxes = fieldset.querySelectorAll<HTMLInputElement>('input')
  return visiblePanels().filter((_, i) => boxes[i]?.checked)
}

function visiblePanels(): Panel[] {
  return [...document.querySelectorAll<SVGSVGElement>('svg.picture')]
    .filter((picture) => picture.clientWidth > 0)
    .map((picture) => ({
      picture,
      name:
        picture.closest('section')?.querySelector('h2')?.textContent ||
        (picture.getAttribute('aria-label') ?? ''),
    }))
}

type Save = (exported: Exported, panels: readonly Panel[], size: Size) => Promise<void>

const FORMATS: Record<string, Save> = {
  SVG: async (exported, panels, size) => {
    save(`${fileName(exported)}.svg`, 'image/svg+xml', figureOf(exported, panels, size).svg)
  },
  PNG: async (exported, panels, size) => {
    save(`${fileName(exported)}.png`, 'image/png', await png(figureOf(exported, panels, size)))
  },
  PDF: async (exported, panels, size) => printed(figureOf(exported, panels, size)),
  'JSON Lines': async (exported) => {
    const text = `${(await lines(exported.stream)).join('\n')}\n`
    save(`${fileName(exported)}.jsonl`, 'application/jsonl', text)
  },
}

function fileName({ title }: Exported): string {
  return title.replace(/ · Januslens$/, '').replace(/[^\p{L}\p{N}]+/gu, '-')
}

export function save(name: string, type: string, content: BlobPart): void {
  const url = URL.createObjectURL(new Blob([content], { type }))
  const link = document.createElement('a')
  link.href = url
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

/** A self-contained SVG and its size on paper. */
interface Figure {
  svg: string
  millimetres: readonly [width: number, height: number]
}

function figureOf(exported: Exported, panels: readonly Panel[], size: Size): Figure {
  const footnotes = exported.footnotes?.() ?? []
  const layOut = (width: number | undefined) => {
    exported.layout(width)
    // A panel that needs more room makes the figure wider, so the others fill it as well.
    if (width) exported.layout(Math.max(width, ...panels.map(widthOf)))
    return arranged(panels, size, footnotes)
  }
  const layouts = size.slide ? SLIDE_LAYOUTS : [size.layout]
  const widths = layouts.map((layout) => sheetOf(layOut(layout), size).width)
  const best = layouts[widths.indexOf(Math.min(...widths))]
  const figure = drawn(layOut(best), size)
  exported.layout(undefined)
  return figure
}

const MARGIN = 16
const PAPER_MARGIN = 6 // a paper has its own
const GAP = 22
const BESIDE = 28 // px between the panels of a row
const SVG = 'http://www.w3.org/2000/svg'
const PIXEL = 25.4 / 96 // mm

/** Where the texts and pictures of a figure are, in pixels. */
interface Arrangement {
  width: number
  height: number
  lines: { text: string; style: keyof typeof FONTS; x: number; y: number }[]
  pictures: { panel: Panel; x: number; y: number }[]
}

/** All panels, in rows below the page's title and above the footnotes; on a slide in columns. */
function arranged(panels: readonly Panel[], size: Size, footnotes: readonly string[]): Arrangement {
  const room = Math.max(size.layout ?? 0, ...panels.map(widthOf))
  const rows = rowsOf(panels, room)
  if (!size.slide) return inColumns([rows], room, size, footnotes)
  const widest = Math.max(1, ...rows.map(rowWidth))
  const all = columnings(rows, rowHeight).map((columns) =>
    inColumns(columns, widest, size, footnotes),
  )
  return all.reduce((a, b) => (sheetOf(b, size).width < sheetOf(a, size).width ? b : a))
}

/** Divides rows into 1, 2, ... columns in their order, so that the highest column is low. */
export function columnings<Row>(rows: readonly Row[], heightOf: (row: Row) => number): Row[][][] {
  const total = (some: readonly Row[]) => some.reduce((sum, row) => sum + heightOf(row), 0)
  const limits = rows.flatMap((_, from) =>
    rows.slice(from).map((_, n) => total(rows.slice(from, from + n + 1))),
  )
  const found = new Map<number, Row[][]>()
  for (const limit of limits.sort((a, b) => a - b)) {
    const columns: Row[][] = []
    for (const row of rows) {
      const last = columns.at(-1)
      if (last && total([...last, row]) <= limit) last.push(row)
      else columns.push([row])
    }
    if (columns.every((column) => total(column) <= limit) && !found.has(columns.length))
      found.set(columns.length, columns)
  }
  return [...found.values()]
}

function inColumns(
  columns: readonly Panel[][][],
  room: number,
  size: Size,
  footnotes: readonly string[],
): Arrangement {
  const margin = size.millimetres && !size.slide ? PAPER_MARGIN : MARGIN
  const inner = columns.length * (room + BESIDE) - BESIDE
  const lines: Arrangement['lines'] = []
  const pictures: Arrangement['pictures'] = []
  let y = margin
  const write = (text: string, style: 'title' | 'quiet') => {
    for (const line of wrapped(text, inner, measured(style))) {
      y += HEIGHTS[style]
      lines.push({ text: line, style, x: margin, y })
    }
  }
  const made = Array.from(
    document.querySelectorAll('.heading .provenance'),
    ({ textContent }) => textContent,
  )
  document.querySelectorAll('.heading h1').forEach((title, i) => {
    write(isolatedText(title), 'title')
    if (made[i] !== made[i + 1]) write(made[i] ?? '', 'quiet') // once for two prompts of one model
  })
  const ends = columns.map((rows, i) => {
    const left = margin + i * (room + BESIDE)
    return rows.reduce((top, row) => placeRow({ lines, pictures }, row, left, top, room), y)
  })
  y = Math.max(y, ...ends)
  if (footnotes.length > 0) y += GAP - HEIGHTS.quiet
  for (const line of footnotes) write(line, 'quiet')
  return { width: inner + 2 * margin, height: y + margin, lines, pictures }
}

/** Places the panels of a row, and their names above them; returns where the row ends. */
function placeRow(
  { lines, pictures }: Pick<Arrangement, 'lines' | 'pictures'>,
  row: readonly Panel[],
  left: number,
  above: number,
  room: number,
): number {
  const titles = row.map((panel) => {
    const own = row.length === 1 ? room : widthOf(panel)
    return wrapped(panel.name, own, measured('panel'))
  })
  const y = above + GAP
  const top = y + HEIGHTS.panel * Math.max(...titles.map(({ length }) => length)) + 8
  let x = left
  row.forEach((panel, i) => {
    titles[i]?.forEach((text, j) => {
      lines.push({ text, style: 'panel', x, y: y + HEIGHTS.panel * (j + 1) })
    })
    pictures.push({ panel, x, y: top })
    x += widthOf(panel) + BESIDE
  })
  return top + rowHeight(row)
}

/** The figure as an image, with resolved colours and fonts. */
function drawn(arrangement: Arrangement, size: Size): Figure {
  const parts = arrangement.lines.map(({ text, style, x, y }) => textLine(text, style, x, y))
  for (const { panel, x, y } of arrangement.pictures) {
    const copy = resolvedCopy(panel.picture)
    copy.setAttribute('x', String(x))
    copy.setAttribute('y', String(y))
    parts.push(new XMLSerializer().serializeToString(copy))
  }
  return framed(parts.join(''), arrangement, size)
}

function widthOf({ picture }: Panel): number {
  return picture.width.baseVal.value
}

function rowHeight(row: readonly Panel[]): number {
  return Math.max(...row.map(({ picture }) => picture.height.baseVal.value))
}

function rowWidth(row: readonly Panel[]): number {
  return row.reduce((width, panel) => width + BESIDE + widthOf(panel), -BESIDE)
}

/** The panels in their order; those that fit beside each other are in one row. */
function rowsOf(panels: readonly Panel[], room: number): Panel[][] {
  const rows: Panel[][] = []
  for (const panel of panels) {
    const row = rows.at(-1)
    if (row && rowWidth([...row, panel]) <= room) row.push(panel)
    else rows.push([panel])
  }
  return rows
}

const FONTS = { title: '700 14px', panel: '600 13px', quiet: '11.5px' } // as in picture.css
const HEIGHTS = { title: 19, panel: 17, quiet: 15 } // px of a line

function textLine(text: string, style: string, x: number, y: number): string {
  const made = document.createElementNS(SVG, 'text')
  made.setAttribute('x', String(x))
  made.setAttribute('y', String(y))
  made.setAttribute('class', style)
  made.textContent = text
  return new XMLSerializer().serializeToString(made)
}

/** The text of an element with the directions of the elements in it. */
function isolatedText(of: Node | null): string {
  const text = Array.from(of?.childNodes ?? [], (node) => {
    if (!(node instanceof HTMLElement)) return node.textContent ?? ''
    if (node.tagName !== 'BDI') return isolatedText(node)
    return `${node.dir === 'rtl' ? '\u2067' : '\u2068'}${isolatedText(node)}\u2069`
  })
  return text.join('')
}

/** The width in pixels of texts of a style. */
function measured(style: keyof typeof FONTS): (text: string) => number {
  const context = document.createElement('canvas').getContext('2d')
  if (!context) return ({ length }) => 8 * length
  const sans = getComputedStyle(document.documentElement).getPropertyValue('--sans')
  context.font = `${FONTS[style]} ${sans}`
  return (text) => context.measureText(text).width
}

/**
 * Lines that are at most `room` wide, broken at spaces, and inside of longer words, as in scripts
 * without spaces. Every line keeps the direction of the text around the break.
 */
export function wrapped(text: string, room: number, widthOf: (text: string) => number): string[] {
  const found: string[] = []
  for (const word of text.trim().split(/\s+/)) {
    for (const [i, piece] of fitting(word, room, widthOf).entries()) {
      const last = found.at(-1)
      const line = `${last} ${piece}`
      if (last !== undefined && i === 0 && widthOf(line) <= room) found[found.length - 1] = line
      else found.push(piece)
    }
  }
  return directed(found)
}

const graphemes = new Intl.Segmenter(undefined, { granularity: 'grapheme' })

/** The word, or its pieces that are at most `room` wide. */
function fitting(word: string, room: number, widthOf: (text: string) => number): string[] {
  if (widthOf(word) <= room) return [word]
  const pieces = ['']
  for (const { segment } of graphemes.segment(word)) {
    const longer = `${pieces.at(-1)}${segment}`
    if (widthOf(longer) > room) pieces.push(segment)
    else pieces[pieces.length - 1] = longer
  }
  return pieces
}

const END = '\u2069'

/** Closes the isolates that are open at the end of a line, and opens them again in the next one. */
function directed(lines: readonly string[]): string[] {
  const open: string[] = []
  return lines.map((line) => {
    const start = open.join('')
    for (const character of line) {
      if (character === END) open.pop()
      else if (/[\u2066-\u2068]/.test(character)) open.push(character)
    }
    return start + line + END.repeat(open.length)
  })
}

/** The size in pixels of the sheet around a figure, which on a slide has margins on two sides. */
function sheetOf({ width, height }: Arrangement, { slide }: Size) {
  return slide
    ? { width: Math.max(width, (height * 16) / 9), height: Math.max(height, (width * 9) / 16) }
    : { width, height }
}

/** The outer element: its viewBox, its size on paper and its background. */
function framed(content: string, arrangement: Arrangement, size: Size): Figure {
  const { width: w, height: h } = sheetOf(arrangement, size)
  const [x, y] = [(arrangement.width - w) / 2, (arrangement.height - h) / 2]
  const paper = size.millimetres ?? w * PIXEL
  const millimetres = [paper, (paper * h) / w] as const
  const [wide, high] = size.millimetres
    ? millimetres.map((side) => `${side.toFixed(2)}mm`)
    : [`${w}`, `${h}`]
  const svg =
    `<svg xmlns="${SVG}" width="${wide}" height="${high}" viewBox="${x} ${y} ${w} ${h}">` +
    `<style>${resolvedStyle()}</style>` +
    `<rect x="${x}" y="${y}" width="${w}" height="${h}" fill="${resolvedColour('--paper')}"/>` +
    `${content}</svg>`
  return { svg, millimetres }
}

/** A copy with inline colours resolved for the current theme. */
function resolvedCopy(picture: SVGSVGElement): SVGSVGElement {
  const copy = picture.cloneNode(true) as SVGSVGElement
  const copies = copy.querySelectorAll<SVGElement>('[style]')
  picture.querySelectorAll('[style]').forEach((original, i) => {
    const style = copies[i]?.style
    if (style?.fill) style.fill = getComputedStyle(original).fill
  })
  return copy
}

/** The pictures' style sheet with all variables replaced by their current values. */
function resolvedStyle(): string {
  return pictureStyle.replace(/var\((--[\w-]+)\)/g, (_, name: string) =>
    name === '--mono' || name === '--sans'
      ? getComputedStyle(document.documentElement).getPropertyValue(name)
      : resolvedColour(name),
  )
}

const DOTS = 300 / 25.4 // per mm

/** Renders a figure with 300 dots per inch. */
async function png({ svg, millimetres }: Figure): Promise<Blob> {
  const url = URL.createObjectURL(new Blob([svg], { type: 'image/svg+xml' }))
  const image = new Image()
  image.src = url
  await image.decode()
  const canvas = document.createElement('canvas')
  canvas.width = Math.round(millimetres[0] * DOTS)
  canvas.height = Math.round(millimetres[1] * DOTS)
  canvas.getContext('2d')?.drawImage(image, 0, 0, canvas.width, canvas.height)
  URL.revokeObjectURL(url)
  return new Promise((resolve, reject) =>
    canvas.toBlob(
      (blob) =>
        blob ? resolve(blob) : reject(new Error('the browser could not render the picture')),
      'image/png',
    ),
  )
}

const ROUNDING = 0.5 // mm, without which a rounded height would need a second sheet

/** Prints a figure alone on a sheet of its size. */
async function printed({ svg, millimetres: [width, height] }: Figure): Promise<void> {
  const url = URL.createObjectURL(new Blob([svg], { type: 'image/svg+xml' }))
  const image = element('img', { class: 'figure-sheet', src: url, alt: '' })
  image.style.width = `${width}mm`
  document.body.append(image)
  await image.decode()
  const sheet = new CSSStyleSheet()
  sheet.replaceSync(`@page { size: ${width}mm ${height + ROUNDING}mm; margin: 0 }`)
  document.adoptedStyleSheets.push(sheet)
  window.addEventListener(
    'afterprint',
    () => {
      image.remove()
      document.adoptedStyleSheets = document.adoptedStyleSheets.filter((one) => one !== sheet)
      URL.revokeObjectURL(url)
    },
    { once: true },
  )
  window.print()
}
