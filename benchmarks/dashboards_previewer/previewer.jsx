// Draws one dashboard from its JSON and Prometheus' answers, which are in window.BOARD.
// Numbers, bars, lines, tables, units, colours and transformations are Grafana's own components,
// of @grafana/ui and @grafana/data. They have no state timeline: that one is drawn here.
import '@fontsource/inter/latin-400.css'; // the font of Grafana
import '@fontsource/inter/latin-500.css';
import 'uplot/dist/uPlot.min.css';
import React from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';
import {
  BarGauge, BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, TimeSeries, VizLegend,
} from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import {
  FieldType, ThemeContext, VizOrientation, createTheme, dateTime, getDisplayProcessor,
  standardTransformers, standardTransformersRegistry, toDataFrame, transformDataFrame,
} from '@grafana/data';

const { panels, title, begin, end } = window.BOARD;
const COLUMN = 1600 / 24;
const LINE = 36;
const GAP = 8;
const theme = createTheme({ colors: { mode: 'dark' } });

Date.now = () => end; // "in 5 hours" is told from the end of the day
standardTransformersRegistry.setInit(() =>
  [standardTransformers.mergeTransformer, standardTransformers.organizeFieldsTransformer].map(
    (one) => ({ id: one.id, name: one.name, transformation: async () => one })
  )
);

const filled = (legend, labels) => legend.replace(/{{\s*(\w+)\s*}}/g, (_, name) => labels[name] ?? '');
const named = ({ __name__, ...labels }) => labels;

/** A frame for each series; its name is the legend. */
function lines({ target, series }) {
  return series.map(({ metric, values, value }) => {
    const points = values ?? [value];
    const labels = named(metric);
    const auto = Object.entries(labels).map(([name, of]) => `${name}="${of}"`).join(', ');
    const name = target.legendFormat === '__auto' ? auto || 'Value' : filled(target.legendFormat, labels);
    return toDataFrame({
      name,
      refId: target.refId,
      fields: [
        { name: 'Time', type: FieldType.time, values: points.map(([at]) => at * 1000) },
        { name, type: FieldType.number, labels, values: points.map(([, of]) => Number(of)), config: { displayName: name } },
      ],
    });
  });
}

/** One frame with a column for each label, as Grafana makes it of Prometheus' answer. */
function table({ target, series }, only) {
  const labels = [...new Set(series.flatMap(({ metric }) => Object.keys(named(metric))))];
  const value = only ? 'Value' : `Value #${target.refId}`;
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: series.map((one) => one.value[0] * 1000) },
      ...labels.map((name) => ({ name, type: FieldType.string, values: series.map((one) => one.metric[name] ?? '') })),
      { name: value, type: FieldType.number, values: series.map((one) => Number(one.value[1])) },
    ],
  });
}

/** The frames of a panel with units and colours, after its transformations. */
async function frames({ panel, answers }) {
  const { defaults, overrides = [] } = panel.fieldConfig ?? {}; // a row has none
  const tables = answers.some(({ target }) => target.format === 'table');
  const read = tables ? answers.map((one) => table(one, answers.length === 1)) : answers.flatMap(lines);
  const context = { interpolate: (text) => text };
  const found = await lastValueFrom(transformDataFrame(panel.transformations ?? [], read, context));
  const mode = panel.type === 'timeseries' ? 'palette-classic' : 'thresholds';
  return found.map((frame, place) => ({
    ...frame,
    fields: frame.fields.map((field) => {
      const properties = overrides.filter(({ matcher }) => matcher.options === (field.config.displayName ?? field.name));
      const own = Object.fromEntries(properties.flatMap((one) => one.properties).map(({ id, value }) => [id, value]));
      const config = { color: { mode }, ...defaults, ...field.config, ...own, links: undefined };
      const shown = { ...field, config, state: { seriesIndex: place, displayName: config.displayName } };
      return { ...shown, display: getDisplayProcessor({ field: shown, theme, timeZone: 'utc' }) };
    }),
  }));
}

const last = (frame) => frame.fields[1].values[frame.fields[1].values.length - 1];
const shown = (frame) => frame.fields[1].display(last(frame));

function Empty() {
  return <div style={{ textAlign: 'center', paddingTop: 20, fontSize: 20 }}>–</div>;
}

function Stat({ data, width, height }) {
  return (
    <BigValue value={{ ...shown(data[0]), title: undefined }} width={width} height={height} theme={theme}
      colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.None} />
  );
}

function Bars({ data, width, height }) {
  const longest = Math.max(...data.map(last));
  const each = Math.min(46, height / data.length);
  const names = { titleWidth: Math.min(width * 0.4, 150), valueWidth: 0, titleHeight: 20, valueHeight: 20 };
  return data.map((frame, place) => {
    const { config } = frame.fields[1];
    const value = { ...shown(frame), title: frame.name };
    return (
      <div key={place} style={{ height: each }}>
        <BarGauge theme={theme} width={width} height={each - 6} orientation={VizOrientation.Horizontal} value={value}
          field={{ ...config, max: config.max ?? longest }} display={frame.fields[1].display} displayMode="basic"
          alignmentFactors={{ title: data.reduce((a, b) => (a.name.length > b.name.length ? a : b)).name, text: '000000 USD' }}
          showUnfilled />
      </div>
    );
  });
}

function Lines({ panel, data, width, height }) {
  const custom = { drawStyle: 'line', lineWidth: 1, fillOpacity: 0, showPoints: 'never', ...panel.fieldConfig.defaults.custom };
  custom.stacking = { group: 'A', mode: 'none', ...custom.stacking };
  data.forEach((frame) => { frame.fields[1].config.custom = custom; });
  const range = { from: dateTime(begin), to: dateTime(end) };
  return (
    <TimeSeries frames={data} width={width} height={height} timeZone="utc" timeRange={{ ...range, raw: range }}
      legend={panel.options.legend} options={{}} structureRev={1} />
  );
}

/** The states of each series: a bar from each change to the next. */
function Timeline({ panel, data, width, height }) {
  const [{ options }] = panel.fieldConfig.defaults.mappings;
  const names = 160;
  const each = (height - 30) / data.length;
  const x = (at) => names + ((width - names) * (at - begin)) / (end - begin);
  const bars = data.flatMap((frame, row) => {
    const [{ values: times }, { values }] = frame.fields;
    const starts = times.map((_, at) => at).filter((at) => at === 0 || values[at] !== values[at - 1]);
    return starts.map((at, n) => {
      const { text, color } = options[values[at]];
      const left = x(times[at]);
      const wide = x(n + 1 < starts.length ? times[starts[n + 1]] : times[times.length - 1]) - left;
      return (
        <div key={`${row} ${at}`} style={{
          position: 'absolute', left, top: row * each + 3, width: wide, height: each - 6, overflow: 'hidden', paddingLeft: 6,
          background: theme.visualization.getColorByName(color), color: '#111', fontSize: 12, lineHeight: `${each - 6}px`,
        }}>{wide > 60 ? text : ''}</div>
      );
    });
  });
  const used = new Set(data.flatMap((frame) => [...frame.fields[1].values]));
  const items = Object.entries(options).filter(([value]) => used.has(Number(value)));
  return (
    <div style={{ position: 'relative', height }}>
      {data.map((frame, row) => (
        <div key={row} style={{ position: 'absolute', top: row * each, lineHeight: `${each}px`, width: names - 8, textAlign: 'right', fontSize: 12, whiteSpace: 'nowrap' }}>
          {frame.name}
        </div>
      ))}
      {bars}
      <div style={{ position: 'absolute', bottom: 0 }}>
        <VizLegend displayMode="list" placement="bottom"
          items={items.map(([, { text, color }]) => ({ label: text, color: theme.visualization.getColorByName(color), yAxis: 1 }))} />
      </div>
    </div>
  );
}

const KINDS = { stat: Stat, bargauge: Bars, timeseries: Lines, 'state-timeline': Timeline };

function Body({ panel, data, width, height }) {
  if (panel.type === 'table') {
    return <TableNG data={data[0]} width={width} height={height} noValue="–" enableVirtualization={false} />;
  }
  const Kind = KINDS[panel.type];
  return data.length ? <Kind panel={panel} data={data} width={width} height={height} /> : <Empty />;
}

function Panel({ panel, data }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: x * COLUMN, top: 44 + y * LINE };
  if (panel.type === 'row') {
    return <div style={{ ...place, padding: '8px 4px', fontSize: 16, fontWeight: 500 }}>⌄ {panel.title}</div>;
  }
  return (
    <div style={place}>
      <PanelChrome title={panel.title} width={w * COLUMN - GAP} height={h * LINE - GAP}>
        {(width, height) => <Body panel={panel} data={data} width={width} height={height} />}
      </PanelChrome>
    </div>
  );
}

const bottom = Math.max(...panels.map(({ panel: { gridPos } }) => gridPos.y + gridPos.h));
const drawn = await Promise.all(panels.map(async (one) => ({ panel: one.panel, data: await frames(one) })));
await Promise.all([400, 500].map((weight) => document.fonts.load(`${weight} 12px Inter`)));
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={{ position: 'relative', width: 1600, height: 44 + bottom * LINE, padding: 4 }}>
      <div style={{ fontSize: 20, padding: '8px 4px' }}>{title}</div>
      {drawn.map(({ panel, data }) => <Panel key={panel.id} panel={panel} data={data} />)}
    </div>
  </ThemeContext.Provider>
);
