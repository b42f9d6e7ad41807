import { exportDialog } from '../browser/export'
import {
  ChangeTracker,
  oncePerFrame,
  revealSelected,
  type Shell,
  setTheme,
  shell,
  showSelection,
  type Theme,
} from '../browser/shell'
import {
  connectToLivePage,
  isLive,
  messages,
  pageDescription,
  reportToParent,
  streamNames,
} from '../browser/streams'
import { listenForTargetChoice, type PageContents } from '../browser/target_choice'
import type { InterveneResponse, TraceResponse } from '../contract'
import { annotationKey } from '../model/annotations'
import { FlowGraph, type GraphNode } from '../model/flow_graph'
import {
  answerAppears,
  type ContributionTree,
  contributionTree,
  type Found,
  pathIds,
  search,
} from '../model/graph_queries'
import type { Marks } from '../presentation/colours'
import {
  element,
  helpDialog,
  promptText,
  provenanceLine,
  Tooltip,
  tokenText,
} from '../presentation/elements'
import { levelNotes, rendered, targetSentence, traceSentences } from '../presentation/sentences'
import { setTabStop } from '../presentation/svg'
import { annotationDialog, annotationLines } from './annotating'
import { filterOf, flipIn, KEYS, listenToKeys, toolbar, traceState } from './controls'
import { HeadMatrix } from './heads'
import { fillInspector } from './inspector'
import { type KnockOut, KnockOuts } from './knock_out'
import { Details } from './layer_view'
import { Overview } from './overview'
import { WhyFigure } from './why'

/** Shows an embedded or posted trace. */
export async function tracePage(): Promise<void> {
  const view = new TraceView(shell(), pageDescription().title)
  connectToLivePage({
    select: ({ layer, position }) => view.select(`L${layer}/p${position}/BLOCK_OUTPUT`),
    theme: (theme) => view.state.set({ theme }),
    names: (names) => view.state.set({ names }),
  })
  view.state.subscribe((changed) => {
    if (changed.has('names')) reportToParent({ names: view.state.get('names') })
    const node = view.graph.node(view.state.get('sel'))
    if (node?.layer !== undefined)
      reportToParent({ at: { layer: node.layer, position: node.position } })
  })
  void showKnockOuts(view)
  const detail = messages<TraceResponse>('trace')
  const header = await detail.next() // first, since it lists the positions that were traced in full
  if (!header.done) view.feed(header.value)
  const replays = [messages<TraceResponse>('overview'), detail]
  // Live streams arrive together; in a saved page the overview is drawn before the rest is inflated.
  if (isLive()) await Promise.all(replays.map((stream) => replay(view, stream)))
  else for (const stream of replays) await replay(view, stream)
  view.draw()
  if (!isLive()) view.revealSelection() // a live page is not opened by a link
  document.documentElement.dataset.ready = 'complete'
}

async function replay(view: TraceView, stream: AsyncGenerator<TraceResponse>): Promise<void> {
  const draw = oncePerFrame(() => view.draw())
  for await (const message of stream) {
    view.feed(message)
    if (isLive()) draw()
    else view.drawIfDue()
  }
}

const KNOCK_OUT = 'knock-out:'

/** Adds measured knock-outs: those embedded in a saved page, or those that the live page posts. */
async function showKnockOuts(view: TraceView): Promise<void> {
  if (isLive()) {
    for await (const measured of messages<KnockOut>('knock-outs')) view.knockOuts.add(measured)
    return
  }
  for (const stream of streamNames().filter((name) => name.startsWith(KNOCK_OUT))) {
    const responses: InterveneResponse[] = []
    for await (const response of messages<InterveneResponse>(stream)) responses.push(response)
    view.knockOuts.add({ id: stream.slice(KNOCK_OUT.length), responses })
  }
}

// Nodes of a contribution tree; the same number as in `trace.why()`.
const LISTED = 16
const KEYS_OF_MARKS = ['sel', 'pin', 'q', 'path'] as const
const NARROWEST = 640 // px; narrower windows scroll
const WHY = 540 // px of the figure beside the overview, at least
const SIDE_BY_SIDE = 1400 // px; wider windows show the overview beside the figure
const MAPS_GAP = 28 // px between the figure and the overview; the same as in styles/layout.css
const REDRAW_INTERVAL = 120 // ms between drawings while messages arrive

/** The view of a trace. */
export class TraceView {
  readonly graph = new FlowGraph()
  readonly state = traceState()
  readonly knockOuts = new KnockOuts(() => this.draw())
  private readonly tooltip = new Tooltip()
  private readonly why: WhyFigure
  private readonly overview: Overview
  private readonly heads: HeadMatrix
  private readonly details: Details
  private readonly openAnnotation = annotationDialog({
    text: () => this.state.get('names'),
    change: (names) => this.rename(names),
  })
  private readonly updateToolbar: () => void
  private readonly maps = element('div', { class: 'maps' })
  private readonly heading = element('div', { class: 'heading' })
  private readonly headerChanges = new ChangeTracker()
  private drawn = 0
  private exportWidth: number | undefined
  private room = 0

  constructor(
    private readonly parts: Shell,
    title: string,
  ) {
    const help = helpDialog(KEYS)
    const commands = {
      select: (id: string) => this.select(id),
      pin: (id: string) => this.pin(id),
      annotate: (id: string) => this.annotate(id),
      openHead: (head: string) => flipIn(this.state, 'heads', head),
      help: () => help.showModal(),
      search: () => parts.toolbar.querySelector<HTMLInputElement>('.search')?.focus(),
      export: exportDialog({
        title,
        stream: 'trace',
        layout: (width) => this.layout(width),
        footnotes: () => annotationLines(this.graph),
      }),
    }
    parts.header.prepend(this.heading)
    this.updateToolbar = toolbar(parts.toolbar, this.state, commands)
    this.why = new WhyFigure(this.graph, this.tooltip, commands)
    this.overview = new Overview(this.graph, this.tooltip, {
      select: (id) => this.select(id),
      pin: (id) => this.pin(id),
      toggleLayer: (layer) => this.toggleLayer(layer),
    })
    this.heads = new HeadMatrix(this.graph, this.tooltip, {
      open: (id) => {
        this.select(id)
        this.details.reveal(id)
      },
      pin: (id) => this.pin(id),
    })
    this.details = new Details(this.graph, this.state, this.tooltip, commands)
    this.maps.append(this.why.element, this.overview.element, this.heads.element)
    parts.main.append(this.maps, this.details.element)
    listenToKeys(this.graph, this.state, commands)
    parts.aside.addEventListener('click', (event) => this.openLink(event))
    listenForTargetChoice(parts.aside, this.graph.tokens, () => this.contents())
    this.heading.addEventListener('click', (event) => this.openLink(event))
    this.state.subscribe(() => this.draw())
    new ResizeObserver(() => {
      this.room = parts.main.clientWidth
      this.draw()
    }).observe(parts.main)
  }

  private contents(): PageContents {
    const { graph } = this
    const target = graph.targets.get(this.position())?.target
    const model = graph.provenance.model ?? ''
    return { command: 'trace', model, prompt: graph.prompt, targets: target ? [target] : [] }
  }

  /** Adds a message of the stream; call `draw` to show it. */
  feed(message: TraceResponse): void {
    this.graph.feed(message)
  }

  /** Draws, unless the last drawing was less than `REDRAW_INTERVAL` ms ago. */
  drawIfDue(): void {
    if (performance.now() - this.drawn > REDRAW_INTERVAL) this.draw()
  }

  draw(): void {
    const { graph, state } = this
    setTheme(state.get('theme') as Theme)
    this.updateToolbar()
    this.room ||= this.parts.main.clientWidth // kept, because reading it lays out the page
    const room = this.exportWidth ?? this.room
    const width = this.widthIn(room)
    if (graph.layers.size === 0) return
    graph.annotate(state.get('names'))
    const position = this.position()
    const found = search(graph, state.get('q'))
    const tree = state.get('path') ? contributionTree(graph, position, LISTED) : undefined
    const marks = this.marks(found, tree)
    if (this.headerChanges.changed(position, graph.labels))
      fillHeader(this.heading, graph, position)
    this.drawMaps(room, position, marks)
    this.details.draw(width, position, marks, this.layers())
    const knockOut = (node: GraphNode) => this.knockOuts.section(node, graph)
    fillInspector(this.parts.aside, graph, state, { position, found, tree, knockOut })
    this.keepFocus()
    showSelection(this.parts.aside, graph.node(state.get('sel'))?.id ?? '')
    this.drawn = performance.now()
    if (!performance.getEntriesByName('januslens-drawn').length) performance.mark('januslens-drawn')
  }

  /** Draws the figure and the maps; a wide window has the figure, and the heads below it, beside the stream. */
  private drawMaps(room: number, position: number, marks: Marks): void {
    const { overview, heads, why } = this
    const width = this.widthIn(room)
    const wide = width >= SIDE_BY_SIDE
    const onlyHeads = this.state.get('map') === 'heads'
    overview.element.hidden = onlyHeads
    heads.element.hidden = !onlyHeads && !wide
    this.maps.classList.toggle('wide', wide)
    const taken = wide ? WHY + MAPS_GAP : 0
    const first = onlyHeads ? heads : overview
    if (onlyHeads) heads.draw(width - taken, position, marks, this.layers())
    else overview.draw(width - taken, position, marks, this.layers(), filterOf(this.state))
    overview.reveal(position, this.layers(), width > room)
    const beside = wide ? width - first.width - MAPS_GAP : room
    why.draw(beside, position, marks)
    if (wide && !onlyHeads)
      heads.draw(beside, position, marks, this.layers(), overview.height - why.height)
  }

  /** The width of pictures in a room; an export fits in it, a narrower window scrolls. */
  private widthIn(room: number): number {
    return this.exportWidth ?? Math.max(NARROWEST, room)
  }

  /** Lays the pictures out for an export of this width; undefined = for the window. */
  private layout(width: number | undefined): void {
    this.exportWidth = width
    this.draw()
  }

  /** The position to explain: the chosen one, or else the last that was traced in full. */
  position(): number {
    const chosen = Number(this.state.get('pos') || Number.NaN)
    return this.graph.prompt[chosen] ? chosen : Math.max(...this.graph.traced)
  }

  /** The layers shown in detail: the chosen ones, or else the one where the answer appears. */
  layers(): number[] {
    const chosen = this.state.list('layers').map(Number)
    const known = chosen.filter((layer) => this.graph.layers.has(layer))
    if (known.length > 0) return known.sort((a, b) => b - a)
    const answer = answerAppears(this.graph, this.position())?.node.layer
    const traced = answer !== undefined && this.graph.layers.has(answer)
    return [traced ? answer : Math.max(...this.graph.layers, 0)]
  }

  select(id: string): void {
    const node = this.graph.node(id)
    if (!node) return
    const layer = this.graph.layerOf(node)
    const layers = this.layers().includes(layer) ? {} : { layers: String(layer) }
    const head = node.kind === 'ATTENTION_NEURON' ? `${layer}.${this.graph.headOf(node)}` : ''
    const opened = this.state.list('heads')
    const heads = head && !opened.includes(head) ? { heads: [...opened, head].join(',') } : {}
    this.state.set({ sel: id, pos: String(node.position), ...layers, ...heads })
    this.parts.live.textContent = this.parts.aside.querySelector('h2')?.textContent ?? ''
  }

  /** Scrolls to the node that a link selected; an untraced position has only its cells in the map. */
  revealSelection(): void {
    const node = this.graph.node(this.state.get('sel'))
    if (!node) return
    if (this.graph.traced.includes(node.position)) this.details.reveal(node.id)
    else revealSelected(this.overview.element)
  }

  pin(id: string): void {
    flipIn(this.state, 'pin', id)
  }

  /** Opens the dialog for the name and the note of a node's head or neuron. */
  private annotate(id: string): void {
    const node = this.graph.node(id)
    if (node && annotationKey(node)) this.openAnnotation(node)
    else this.parts.live.textContent = 'Select a head or a neuron to name it.'
  }

  private rename(names: string): void {
    const { aside } = this.parts
    const inside = aside.contains(document.activeElement)
    this.state.set({ names })
    if (inside) aside.querySelector<HTMLElement>('.annotate')?.focus() // drawn anew
  }

  toggleLayer(layer: number): void {
    const shown = this.layers()
    const next = shown.includes(layer) ? shown.filter((l) => l !== layer) : [...shown, layer]
    this.state.set({ layers: next.join(',') })
  }

  private marks(found: readonly Found[], tree: ContributionTree | undefined): Marks {
    const searching = this.state.get('q').trim() !== ''
    return {
      key: KEYS_OF_MARKS.map((key) => this.state.get(key)).join(' '),
      selected: this.state.get('sel'),
      pinned: new Set(this.state.list('pin')),
      found: searching ? new Set(found.map(({ node }) => node.id)) : undefined,
      path: tree && pathIds(tree),
    }
  }

  private openLink(event: Event): void {
    const target = event.target as Element
    const named = target.closest<HTMLElement>('[data-annotate]')?.dataset.annotate
    const unpin = target.closest<HTMLElement>('[data-unpin]')?.dataset.unpin
    const id = target.closest<HTMLElement>('[data-id]')?.dataset.id
    if (named) this.annotate(named)
    else if (unpin) this.pin(unpin)
    else if (id) {
      this.select(id)
      this.details.reveal(id)
    }
  }

  private keepFocus(): void {
    const selected = this.state.get('sel')
    for (const picture of document.querySelectorAll('svg.picture')) {
      const current = selected
        ? (picture.querySelector(`[tabindex][data-id="${CSS.escape(selected)}"]`) ?? undefined)
        : undefined
      setTabStop(picture, current)
    }
  }
}

/** The prompt and target, the summary, and the provenance. */
export function fillHeader(heading: HTMLElement, graph: FlowGraph, position: number): void {
  const target = graph.targets.get(position)?.target
  const title = element('h1', {}, promptText(graph.prompt, position))
  if (target) title.append(element('span', { class: 'arrow' }, ' → '), tokenText(target.label))
  title.lastElementChild?.classList.add('answer')
  heading.replaceChildren(
    title,
    story(graph, position),
    provenanceLine(graph.provenance, graph.complete),
  )
}

/** The summary of a trace; while messages arrive, only what can no longer change. */
function story(graph: FlowGraph, position: number): HTMLElement {
  const sentences = graph.complete
    ? [...traceSentences(graph, position), ...levelNotes(graph.limited).map((note) => [note])]
    : [targetSentence(graph, position) ?? [], ['The trace is incomplete.']]
  const parts = sentences.flatMap((sentence) => [...rendered(sentence), ' '])
  return element('p', { class: 'story' }, ...parts)
}
